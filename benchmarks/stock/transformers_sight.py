"""Stock architectures of transformers that see."""

from __future__ import annotations

import torch

from benchmarks.stock import tasks
from benchmarks.stock.transformers_models import KEEP, ROWS, Batch, pictures, stock


def hidden_patches() -> Batch:
    """Draw what is hidden of a picture."""
    return {"pixel_values": tasks.stripes(ROWS)[0]}


def hidden_marked() -> Batch:
    """Draw what is hidden of a picture, where the data says which patches those are."""
    return {"pixel_values": tasks.stripes(ROWS)[0], "bool_masked_pos": torch.rand(ROWS, 16) < 0.5}


def _stages(width: int) -> list[int]:
    return [width // 2, width]


_PYRAMID = {"depths": [1, 1], "hidden_sizes": _stages, "num_encoder_blocks": 2, "strides": [4, 2]}
"""Two stages, of which the second sees less and is wider."""

_ATTENTION = {"num_attention_heads": [1, 2], "mlp_ratios": [4, 4]}
"""In each of them."""

MODELS = [
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
        **_PYRAMID,
        patch_sizes=[7, 3],
        padding=[2, 1],
    ),
    stock(
        "pvt",
        pictures,
        **_PYRAMID,
        **_ATTENTION,
        patch_sizes=[4, 2],
        sequence_reduction_ratios=[2, 1],
    ),
    stock(
        "pvt_v2",
        pictures,
        **_PYRAMID,
        **_ATTENTION,
        patch_sizes=[7, 3],
        sr_ratios=[2, 1],
    ),
    stock(
        "segformer",
        pictures,
        **_PYRAMID,
        **_ATTENTION,
        patch_sizes=[7, 3],
        sr_ratios=[2, 1],
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
