"""Stock architectures of transformers that see, hear, forecast and act."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import DecisionTransformerModel, PreTrainedConfig

from benchmarks.stock import tasks
from benchmarks.stock.transformers_models import KEEP, ROWS, Batch, pictures, sounds, stock


def hidden_patches() -> Batch:
    """Draw what is hidden of a picture."""
    return {"pixel_values": tasks.stripes(ROWS)[0]}


def hidden_marked() -> Batch:
    """Draw what is hidden of a picture, where the data says which patches those are."""
    return {"pixel_values": tasks.stripes(ROWS)[0], "bool_masked_pos": torch.rand(ROWS, 16) < 0.5}


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


def _stages(width: int) -> list[int]:
    return [width // 2, width]


SIGHT = [
    stock("vit", pictures, patch_size=8),
    stock("vit", pictures, patch_size=8, trainer=True),
    stock("vit", pictures, patch_size=8, pooled=True),
    stock("deit", pictures, model="DeiTForImageClassification", patch_size=8),
    stock("beit", pictures, patch_size=8),
    stock("data2vec-vision", pictures, patch_size=8),
    stock("dinov2", pictures, patch_size=8),
    stock("dinov2_with_registers", pictures, patch_size=8),
    stock("dinov3_vit", pictures, patch_size=8, pooled=True),
    stock("ijepa", pictures, patch_size=8),
    stock("vit_msn", pictures, patch_size=8),
    stock(
        "vit_mae",
        hidden_patches,
        patch_size=8,
        model="ViTMAEForPreTraining",
        decoder_hidden_size=lambda w: w,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=lambda w: 4 * w,
    ),
    stock("vit", hidden_marked, patch_size=8, encoder_stride=8, model="ViTForMaskedImageModeling"),
    stock("yolos", pictures, image_size=[32, 32], patch_size=8, pooled=True),
    stock(
        "swin",
        pictures,
        patch_size=2,
        embed_dim=lambda w: w // 2,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
        hidden_size=KEEP,
        num_hidden_layers=KEEP,
        num_attention_heads=KEEP,
    ),
    stock(
        "swinv2",
        pictures,
        patch_size=2,
        embed_dim=lambda w: w // 2,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=4,
        hidden_size=KEEP,
        num_hidden_layers=KEEP,
        num_attention_heads=KEEP,
    ),
    stock("convnext", pictures, hidden_sizes=_stages, depths=[1, 1], num_stages=2),
    stock("convnextv2", pictures, hidden_sizes=_stages, depths=[1, 1], num_stages=2),
    stock("resnet", pictures, embedding_size=16, hidden_sizes=_stages, depths=[1, 1]),
    stock("resnet", pictures, trainer=True, embedding_size=16, hidden_sizes=_stages, depths=[1, 1]),
    stock("regnet", pictures, embedding_size=16, hidden_sizes=_stages, depths=[1, 1], groups_width=8),
    stock("bit", pictures, embedding_size=16, num_groups=4, hidden_sizes=_stages, depths=[1, 1]),
    stock("mobilenet_v1", pictures, depth_multiplier=lambda w: w / 256),
    stock("mobilenet_v2", pictures, depth_multiplier=lambda w: w / 256),
    stock(
        "mobilevit",
        pictures,
        hidden_sizes=lambda w: [w, w, w],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
        patch_size=2,
    ),
    stock(
        "efficientnet", pictures, width_coefficient=lambda w: w / 256, depth_coefficient=0.3, hidden_dim=lambda w: 5 * w
    ),
    stock(
        "poolformer",
        pictures,
        depths=[1, 1],
        hidden_sizes=_stages,
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        padding=[2, 1],
    ),
    stock(
        "pvt",
        pictures,
        depths=[1, 1],
        hidden_sizes=_stages,
        num_encoder_blocks=2,
        patch_sizes=[4, 2],
        strides=[4, 2],
        sequence_reduction_ratios=[2, 1],
        num_attention_heads=[1, 2],
        mlp_ratios=[4, 4],
    ),
    stock(
        "pvt_v2",
        pictures,
        depths=[1, 1],
        hidden_sizes=_stages,
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        sr_ratios=[2, 1],
        num_attention_heads=[1, 2],
        mlp_ratios=[4, 4],
    ),
    stock(
        "segformer",
        pictures,
        depths=[1, 1],
        hidden_sizes=_stages,
        num_encoder_blocks=2,
        patch_sizes=[7, 3],
        strides=[4, 2],
        sr_ratios=[2, 1],
        num_attention_heads=[1, 2],
        mlp_ratios=[4, 4],
    ),
    stock(
        "cvt",
        pictures,
        model="CvtForImageClassification",
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=_stages,
        num_heads=[1, 2],
        depth=[1, 2],
        mlp_ratio=[4.0, 4.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.1],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    ),
    stock(
        "levit",
        pictures,
        model="LevitForImageClassification",
        hidden_sizes=lambda w: [w // 2, w, w],
        num_attention_heads=[2, 4, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        mlp_ratio=[2, 2, 2],
        attention_ratio=[2, 2, 2],
        patch_size=16,
    ),
    stock(
        "focalnet",
        pictures,
        patch_size=2,
        embed_dim=lambda w: w // 2,
        hidden_sizes=KEEP,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    stock(
        "hiera",
        pictures,
        embed_dim=lambda w: w // 2,
        image_size=[32, 32],
        depths=[1, 1],
        num_heads=[2, 4],
        masked_unit_size=[4, 4],
        query_stride=[2, 2],
        num_query_pool=1,
        masked_unit_attention=[True, False],
        hidden_size=KEEP,
    ),
    stock("swiftformer", pictures, depths=[1, 1, 1, 1], embed_dims=lambda w: [w // 4, w // 2, w // 2, w]),
]
SOUND = [
    stock(
        "wav2vec2",
        sounds,
        conv_dim=[32, 32, 32],
        conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 8],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=lambda w: w,
        mask_time_length=2,
    ),
    stock(
        "wav2vec2",
        sounds,
        tag="unmasked",
        apply_spec_augment=False,
        conv_dim=[32, 32, 32],
        conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 8],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=lambda w: w,
    ),
    stock(
        "wav2vec2",
        letters,
        model="Wav2Vec2ForCTC",
        conv_dim=[32, 32, 32],
        conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 8],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_length=2,
        num_labels=KEEP,
    ),
    stock(
        "hubert",
        sounds,
        conv_dim=[32, 32, 32],
        conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 8],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=lambda w: w,
        mask_time_length=2,
    ),
    stock(
        "wavlm",
        sounds,
        conv_dim=[32, 32, 32],
        conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 8],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=lambda w: w,
        mask_time_length=2,
    ),
    stock(
        "sew",
        sounds,
        conv_dim=[32, 32, 32],
        conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 8],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=lambda w: w,
        mask_time_length=2,
    ),
    stock(
        "unispeech-sat",
        sounds,
        conv_dim=[32, 32, 32],
        conv_stride=[5, 4, 4],
        conv_kernel=[10, 8, 8],
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=lambda w: w,
        mask_time_length=2,
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
        classifier_proj_size=lambda w: w,
        mask_time_length=2,
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
        d_model=lambda w: w,
        prediction_length=6,
        context_length=24,
        lags_sequence=[1, 2],
        num_time_features=1,
        scaling="std",
    ),
    stock(
        "informer",
        series,
        model="InformerForPrediction",
        d_model=lambda w: w,
        prediction_length=6,
        context_length=24,
        lags_sequence=[1, 2],
        num_time_features=1,
        scaling="std",
    ),
    stock(
        "autoformer",
        series,
        model="AutoformerForPrediction",
        d_model=lambda w: w,
        prediction_length=6,
        context_length=24,
        lags_sequence=[1, 2],
        num_time_features=1,
        scaling="std",
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
_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 4}


def _towers(width: int) -> dict[str, object]:
    return {"hidden_size": width, "intermediate_size": 4 * width, **_TOWER}


TOGETHER = [
    stock(
        "clip",
        captioned,
        model="CLIPModel",
        projection_dim=lambda w: w,
        text_config=lambda w: (
            _towers(w)
            | {"vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
        ),
        vision_config=lambda w: _towers(w) | {"image_size": 32, "patch_size": 8},
    ),
    stock(
        "siglip",
        captioned,
        model="SiglipModel",
        text_config=lambda w: (
            _towers(w)
            | {
                "vocab_size": 32,
                "max_position_embeddings": 8,
                "projection_size": w,
                "eos_token_id": 2,
                "bos_token_id": 1,
                "pad_token_id": 0,
            }
        ),
        vision_config=lambda w: _towers(w) | {"image_size": 32, "patch_size": 8},
    ),
    stock(
        "blip",
        captioned,
        model="BlipModel",
        projection_dim=lambda w: w,
        text_config=lambda w: (
            _towers(w)
            | {
                "vocab_size": 32,
                "max_position_embeddings": 8,
                "encoder_hidden_size": w,
                "eos_token_id": 2,
                "bos_token_id": 1,
                "pad_token_id": 0,
                "sep_token_id": 2,
            }
        ),
        vision_config=lambda w: _towers(w) | {"image_size": 32, "patch_size": 8},
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
MODELS = [*SIGHT, *SOUND, *FORECASTS, *TOGETHER]
