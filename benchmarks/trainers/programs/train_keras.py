"""Keras on its torch backend."""

import os

os.environ["KERAS_BACKEND"] = "torch"
import keras
import numpy as np

keras.utils.set_random_seed(0)
x = np.random.default_rng(0).standard_normal((256, 8)).astype("float32")
y = np.sin(x.sum(1, keepdims=True))
model = keras.Sequential([keras.layers.Dense(32, activation="tanh"), keras.layers.Dense(1)])
model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="mse")
model.build((None, 8))
callbacks = []
# --- watch here ---
history = model.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=callbacks)
print(history.history["loss"][-1])
