"""Stock architectures of transformers that hear, forecast, act, or match pictures with words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DecisionTransformerModel, PreTrainedConfig

from benchmarks.stock import tasks
from benchmarks.stock.transformers_models import KEEP, ROWS, Batch, sounds, stock


def letters() -> Batch:
    """Write down what is heard: one letter for a pitch."""
    sound, labels = tasks.tones(ROWS // 2)
    return {"input_values": sound, "labels": labels[:, None] + tasks.SPECIAL}


def dictation() -> Batch:
    """Write down what a spectrogram (bins before frames) says."""
    spectrum, labels = tasks.mel(ROWS // 2, 16, 32)
    said = torch.stack([torch.full_like(labels, 5), labels + tasks.SPECIAL, torch.full_like(labels, 2)], 1)
    return {"input_features": spectrum.mT, "labels": said}


def dictation_by_frame() -> Batch:
    """Write down what a spectrogram (frames before bins) says."""
    batch = dictation()
    return batch | {"input_features": batch["input_features"].mT}


def bands() -> Batch:
    """Classify spectrograms."""
    spectrum, labels = tasks.mel(ROWS // 2, 16, 32)
    return {"input_values": spectrum, "labels": labels}


def series() -> Batch:
    """Forecast 6 values from 24, with two more for the lags."""
    values = tasks.sines(ROWS, 32)
    seen, time = torch.ones(ROWS, 26), torch.arange(32.0).expand(ROWS, 32)[..., None] / 32
    return {
        "past_values": values[:, :26],
        "past_time_features": time[:, :26],
        "past_observed_mask": seen,
        "future_values": values[:, 26:],
        "future_time_features": time[:, 26:],
    }


def windows() -> Batch:
    """Forecast 8 values of two channels from 32."""
    values = torch.stack([tasks.sines(ROWS, 40), tasks.sines(ROWS, 40)], -1)
    return {"past_values": values[:, :32], "future_values": values[:, 32:]}


def masked_windows() -> Batch:
    """Find the values that are hidden."""
    return {"past_values": torch.stack([tasks.sines(ROWS, 32), tasks.sines(ROWS, 32)], -1)}


def captions() -> Batch:
    """Match pictures with the words for them."""
    pixels, labels = tasks.stripes(ROWS)
    words = tasks.language(ROWS, 8)
    words[:, 0], words[:, 3], words[:, -1] = 1, labels + tasks.SPECIAL, 2
    return {"input_ids": words, "pixel_values": pixels, "attention_mask": torch.ones_like(words)}


def captioned() -> Batch:
    """Match pictures with words, where the model computes the loss."""
    return captions() | {"return_loss": True}


def questions() -> Batch:
    """Answer a question about a picture, which the picture decides."""
    pixels, labels = tasks.stripes(ROWS)
    target = torch.nn.functional.one_hot(labels, tasks.CLASSES).float()
    return {"input_ids": tasks.language(ROWS, 8), "pixel_values": pixels, "labels": target}


def returns() -> Batch:
    """Act as was acted: away from where one is."""
    states = torch.randn(ROWS, 8, 3)
    return {
        "states": states,
        "actions": -states[..., :2],
        "rewards": torch.zeros(ROWS, 8, 1),
        "returns_to_go": torch.ones(ROWS, 8, 1),
        "timesteps": torch.arange(8).expand(ROWS, 8),
        "attention_mask": torch.ones(ROWS, 8),
    }


class Acting(nn.Module):
    """The decision transformer, which is trained by the distance to the actions that were taken."""

    def __init__(self, config: PreTrainedConfig) -> None:
        """Build it."""
        super().__init__()
        self.model = DecisionTransformerModel(config)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the loss."""
        return {"loss": nn.functional.mse_loss(self.model(**inputs).action_preds, inputs["actions"])}


def _tower(width: int) -> dict[str, int]:
    return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4}


def _vision(width: int) -> dict[str, int]:
    return _tower(width) | {"image_size": tasks.IMAGE, "patch_size": 8}


def _text(width: int) -> dict[str, int]:
    names = {"vocab_size": tasks.VOCABULARY, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1}
    ends = {"eos_token_id": 2, "sep_token_id": 2}
    return _tower(width) | names | ends | {"projection_size": width, "encoder_hidden_size": width}


SPEECH = {
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 8, 8],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": lambda w: w,
    "mask_time_length": 2,
}
LAGGED = {
    "d_model": lambda w: w,
    "prediction_length": 6,
    "context_length": 24,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "scaling": "std",
}
SOUND = [
    stock(
        "wav2vec2",
        sounds,
        **SPEECH,
    ),
    stock(
        "wav2vec2",
        sounds,
        tag="unmasked",
        apply_spec_augment=False,
        **SPEECH,
    ),
    stock(
        "wav2vec2",
        letters,
        model="Wav2Vec2ForCTC",
        **SPEECH,
        num_labels=KEEP,
    ),
    stock(
        "hubert",
        sounds,
        **SPEECH,
    ),
    stock(
        "wavlm",
        sounds,
        **SPEECH,
    ),
    stock(
        "sew",
        sounds,
        **SPEECH,
    ),
    stock(
        "unispeech-sat",
        sounds,
        **SPEECH,
    ),
    stock(
        "data2vec-audio",
        sounds,
        conv_dim=[32, 32, 32],
        conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 8],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=2,
        conv_pos_kernel_size=3,
        num_conv_pos_embedding_groups=4,
    ),
    stock(
        "audio-spectrogram-transformer",
        bands,
        model="ASTForAudioClassification",
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    stock(
        "whisper",
        dictation,
        model="WhisperForConditionalGeneration",
        d_model=lambda w: w,
        num_mel_bins=16,
        max_source_positions=16,
        max_target_positions=16,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    stock(
        "speech_to_text",
        dictation_by_frame,
        model="Speech2TextForConditionalGeneration",
        d_model=lambda w: w,
        input_feat_per_channel=16,
        conv_channels=32,
        max_source_positions=32,
        max_target_positions=16,
    ),
]
FORECASTS = [
    stock(
        "time_series_transformer",
        series,
        model="TimeSeriesTransformerForPrediction",
        **LAGGED,
    ),
    stock(
        "informer",
        series,
        model="InformerForPrediction",
        **LAGGED,
    ),
    stock(
        "autoformer",
        series,
        model="AutoformerForPrediction",
        **LAGGED,
        moving_average=5,
    ),
    stock(
        "patchtst",
        windows,
        model="PatchTSTForPrediction",
        d_model=lambda w: w,
        ffn_dim=lambda w: 2 * w,
        num_input_channels=2,
        context_length=32,
        prediction_length=8,
        patch_length=4,
        patch_stride=4,
    ),
    stock(
        "patchtst",
        masked_windows,
        model="PatchTSTForPretraining",
        d_model=lambda w: w,
        ffn_dim=lambda w: 2 * w,
        num_input_channels=2,
        context_length=32,
        patch_length=4,
        patch_stride=4,
        do_mask_input=True,
    ),
    stock(
        "patchtsmixer",
        windows,
        model="PatchTSMixerForPrediction",
        d_model=lambda w: w,
        num_layers=2,
        num_input_channels=2,
        context_length=32,
        prediction_length=8,
        patch_length=4,
        patch_stride=4,
    ),
]
TOGETHER = [
    stock(
        "clip",
        captioned,
        model="CLIPModel",
        projection_dim=lambda w: w,
        text_config=_text,
        vision_config=_vision,
    ),
    stock(
        "siglip",
        captioned,
        model="SiglipModel",
        text_config=_text,
        vision_config=_vision,
    ),
    stock(
        "blip",
        captioned,
        model="BlipModel",
        projection_dim=lambda w: w,
        text_config=_text,
        vision_config=_vision,
    ),
    stock("vilt", questions, model="ViltForQuestionAnswering", patch_size=8),
    stock(
        "decision_transformer",
        returns,
        model=Acting,
        state_dim=3,
        act_dim=2,
        max_ep_len=16,
        n_inner=KEEP,
        action_tanh=False,
    ),
]
MODELS = [*SOUND, *FORECASTS, *TOGETHER]
