"""Qlib: its LSTM on returns drawn at random, without a market's data."""

import numpy as np
import pandas as pd
from qlib.contrib.model.pytorch_lstm import LSTM
from qlib.data.dataset import DatasetH
from qlib.data.dataset.handler import DataHandlerLP

rng = np.random.default_rng(0)
days, stocks = pd.date_range("2020-01-01", periods=60), [f"S{i}" for i in range(20)]
rows = pd.MultiIndex.from_product([days, stocks], names=["datetime", "instrument"])
columns = pd.MultiIndex.from_tuples([*(("feature", f"day {i}") for i in range(12)), ("label", "return")])
table = pd.DataFrame(rng.standard_normal((len(rows), 13)), rows, columns)
table[("label", "return")] = table["feature"].mean(axis=1)
handler = DataHandlerLP.from_df(table)
dataset = DatasetH(handler, {"train": (days[0], days[39]), "valid": (days[40], days[49]), "test": (days[50], days[59])})

model = LSTM(d_feat=4, hidden_size=16, num_layers=1, n_epochs=4, batch_size=100, lr=0.01, GPU=-1, seed=0)
# --- watch here ---
scores = {}
model.fit(dataset, evals_result=scores, save_path="best.bin")
print(-scores["train"][-1])  # a score is the negated loss
