"""One small random model for every way a family of a source library is built, and how that library runs it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import hub_models
import open_clip
import timm
import torch
import transformers
from open_clip.model import resize_pos_embed
from timm.layers import RmsNorm, SwiGLUPacked
from torch import Tensor, nn

NATIVE, OTHER = (32, 48), (56, 40)
SQUARE = (32, 32)


@dataclass(frozen=True)
class Case:
    """A source model: how to make it, and how to get from it what parity is about."""

    library: str
    make: Callable[[tuple[int, int]], nn.Module]
    """From the native size to a model."""
    source_class: str
    native: tuple[int, int] = NATIVE
    resize: Callable[..., nn.Module] = lambda module, size: module
    """The module as it is to be run at another size."""
    other: tuple[int, int] | None = OTHER
    """Another image size, if the source library takes one."""
    call: Callable[..., Any] = lambda module, images, **options: module(pixel_values=images, **options)
    """transformers: how the module is called, with options where the size is not the native one."""
    other_options: tuple[str, ...] = ("interpolate_pos_encoding",)
    """Those options, all of them flags."""
    pooled: Callable[[Tensor], Tensor] = lambda tokens: tokens[:, 0]
    """transformers: what stands for the output where the library returns normalised tokens only."""
    norm: bool = True
    """Whether the tokens are normalised at the end."""
    exports: bool = True
    """Whether the weights can be written back under their own names."""


def run(case: Case, module: nn.Module, images: Tensor, at_native: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """The source library's residual stream before and after every block, normalised tokens, and main output."""
    vision = vision_part(module)
    blocks, norm = parts(case.library, vision)
    streams: list[Tensor] = []
    normalised: list[Tensor] = []
    first = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
    handles = [blocks[0].register_forward_pre_hook(lambda _, args: streams.append(args[0]))]
    handles += [block.register_forward_hook(lambda _, __, out: streams.append(first(out))) for block in blocks]
    handles.append(norm.register_forward_hook(lambda _, __, out: normalised.append(out)))
    with torch.no_grad():
        if case.library == "transformers":
            options = {} if at_native else dict.fromkeys(case.other_options, True)
            output = main_output(case.call(module, images, **options), case.pooled)
        else:
            output = first(vision(images))
        if not normalised or normalised[-1].shape != streams[-1].shape:  # only the pooled token is
            normalised = [norm(streams[-1]) if case.norm else streams[-1]]
    for handle in handles:
        handle.remove()
    return streams, normalised[-1], output


def main_output(result: Any, pooled: Callable[[Tensor], Tensor] = lambda tokens: tokens[:, 0]) -> Tensor:
    """Logits, else the projection, else the pooled token, else what is made of a transformers output's tokens."""
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(result, name, None) is not None:
            return result[name]
    return pooled(result.last_hidden_state)


def vision_part(module: nn.Module) -> nn.Module:
    """Where the modules of the vision transformer stand, through any number of wrappers."""
    names = ("vit", "deit", "ijepa", "dinov2", "dinov2_with_registers", "clip", "vision_model", "visual")
    inner = (part for name in names if isinstance(part := getattr(module, name, None), nn.Module))
    part = next(inner, None)
    return module if part is None else vision_part(part)


def parts(library: str, vision: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """The blocks and the final norm."""
    vision = getattr(vision, "trunk", vision)  # open_clip's TimmModel
    if hasattr(vision, "blocks"):
        return list(vision.blocks), vision.norm
    if library == "open_clip":
        after_pooling = vision.attn_pool is not None or vision.final_ln_after_pool
        return list(vision.transformer.resblocks), nn.Identity() if after_pooling else vision.ln_post
    encoder = next((part for name in ("encoder", "model") if (part := getattr(vision, name, None))), vision)
    named = {name: part for name, part in vision.named_children() if "norm" in name and name != "pre_layrnorm"}
    [norm] = named.values()
    return list(encoder.layers if hasattr(encoder, "layers") else encoder.layer), norm


# transformers --------------------------------------------------------------------------------------------------------

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "layer_norm_eps": 1e-2,  # large, so that a wrong one shows
}
LABELS = {"num_labels": 7}


def hugging(
    class_name: str,
    *,
    native: tuple[int, int] = SQUARE,
    arguments: dict | None = None,
    other: tuple[int, int] | None = OTHER,
    case: dict | None = None,
    **options: Any,
) -> Case:
    """transformers resamples positions of square models only, so a non-square one runs at its native size."""
    model_class = getattr(transformers, class_name)

    def make(size: tuple[int, int]) -> nn.Module:
        image_size = size[0] if size[0] == size[1] else size
        described = SIZES | {"patch_size": 8, "image_size": image_size} | options
        if "vision_config" in getattr(model_class.config_class, "sub_configs", {}):
            text = {name: value for name, value in SIZES.items() if name != "layer_norm_eps"}
            text |= {"vocab_size": 50, "max_position_embeddings": 8, "num_hidden_layers": 1}
            config = model_class.config_class(
                vision_config=described, text_config=text, projection_dim=24, num_labels=described.get("num_labels", 2)
            )
        else:
            config = model_class.config_class(**described)
        return model_class(config, **arguments or {})

    square = native == SQUARE and "patch_size" not in options
    return Case("transformers", make, class_name, native, other=other if square else None, **case or {})


def _image_features(module: nn.Module, images: Tensor, **options: Any) -> Any:
    return module.get_image_features(pixel_values=images, **options)


def _mae(module: nn.Module, images: Tensor, **options: Any) -> Any:
    """The encoder on all patches in order."""
    encoder = vision_part(module)
    n_patches = images.shape[2] // 8 * (images.shape[3] // 8)
    return encoder(images, noise=torch.arange(n_patches).expand(len(images), -1).float(), **options)


def _naflex(module: nn.Module, images: Tensor) -> Any:
    """SigLIP 2 on unpadded patches."""
    height, width = images.shape[2] // 8, images.shape[3] // 8
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8)  # [batch, channel, h, w, y, x]
    arguments = {
        "pixel_values": patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2),
        "pixel_attention_mask": torch.ones(len(images), height * width, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[height, width]] * len(images)),
    }
    return getattr(module, "get_image_features", module)(**arguments)


def _mean(tokens: Tensor) -> Tensor:
    return tokens.mean(1)


_dinov2 = {"layerscale_value": 0.5, "mlp_ratio": 3}
_any_size = {"other_options": ()}
_dinov2_case = {"case": _any_size}
_whole = {"case": {"call": _image_features}}
_unnormed = {"norm": False}
_siglip2 = {"num_patches": 16, "case": {"call": _naflex, "other_options": ()}}
_mae_case = {"mask_ratio": 0.0, "case": {"call": _mae}}
_aimv2 = {"rms_norm_eps": 1e-2}
_native_aimv2 = _aimv2 | {"is_native": True, "case": _any_size}
_internvl = {"layer_norm_eps": 1e-2, "layer_scale_init_value": 0.5}

TRANSFORMERS = {
    "ViTModel": hugging("ViTModel"),
    "ViTModel without pooler": hugging("ViTModel", arguments={"add_pooling_layer": False}),
    "ViTModel without qkv bias": hugging("ViTModel", qkv_bias=False),
    "ViTModel with tanh GELU, mask token, one channel": hugging(
        "ViTModel", arguments={"use_mask_token": True}, hidden_act="gelu_pytorch_tanh", num_channels=1
    ),
    "ViTForImageClassification": hugging("ViTForImageClassification", **LABELS),
    "ViTForImageClassification, ReLU, non-square image and patch": hugging(
        "ViTForImageClassification", native=NATIVE, hidden_act="relu", patch_size=(8, 4), **LABELS
    ),
    "DeiTModel": hugging("DeiTModel"),
    "DeiTForImageClassification": hugging("DeiTForImageClassification", **LABELS),
    "DeiTForImageClassificationWithTeacher": hugging(
        "DeiTForImageClassificationWithTeacher", case={"exports": False}, **LABELS
    ),
    "ViTMSNModel": hugging("ViTMSNModel"),
    "ViTMSNForImageClassification": hugging("ViTMSNForImageClassification", **LABELS),
    "IJepaModel": hugging("IJepaModel", case={"pooled": _mean}),
    "IJepaForImageClassification": hugging("IJepaForImageClassification", **LABELS),
    "ViTMAEModel": hugging("ViTMAEModel", **_mae_case),
    "ViTMAEForPreTraining": hugging(
        "ViTMAEForPreTraining",
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
        **_mae_case,
    ),
    "CLIPModel": hugging("CLIPModel", **_whole),
    "CLIPVisionModel": hugging("CLIPVisionModel"),
    "CLIPVisionModel with GELU": hugging("CLIPVisionModel", hidden_act="gelu"),
    "CLIPVisionModelWithProjection": hugging("CLIPVisionModelWithProjection", projection_dim=24),
    "CLIPVisionModelWithProjection with GELU": hugging(
        "CLIPVisionModelWithProjection", projection_dim=24, hidden_act="gelu"
    ),
    "CLIPForImageClassification": hugging("CLIPForImageClassification", case=_unnormed, **LABELS),
    "MetaClip2VisionModel": hugging("MetaClip2VisionModel"),
    "MetaClip2VisionModelWithProjection": hugging("MetaClip2VisionModelWithProjection", projection_dim=24),
    "MetaClip2Model": hugging("MetaClip2Model", **_whole),
    "MetaClip2ForImageClassification": hugging("MetaClip2ForImageClassification", case=_unnormed, **LABELS),
    "CLIPSegVisionModel": hugging("CLIPSegVisionModel"),
    "CLIPSegModel": hugging("CLIPSegModel", **_whole),
    "CLIPSegForImageSegmentation": hugging(
        "CLIPSegForImageSegmentation",
        case={"call": lambda module, images, **options: module.clip.vision_model(images, **options)},
    ),
    "SiglipVisionModel": hugging("SiglipVisionModel"),
    "SiglipVisionModel without head": hugging(
        "SiglipVisionModel", vision_use_head=False, hidden_act="gelu", case={"pooled": _mean}
    ),
    "SiglipModel": hugging("SiglipModel", hidden_act="gelu", **_whole),
    "SiglipForImageClassification": hugging("SiglipForImageClassification", **LABELS),
    "Siglip2VisionModel": hugging("Siglip2VisionModel", **_siglip2),
    "Siglip2Model": hugging("Siglip2Model", **_siglip2),
    "Siglip2ForImageClassification": hugging("Siglip2ForImageClassification", **_siglip2, **LABELS),
    "Dinov2Model": hugging("Dinov2Model", **_dinov2, **_dinov2_case),
    "Dinov2Model, SwiGLU": hugging("Dinov2Model", use_swiglu_ffn=True, **_dinov2, **_dinov2_case),
    "Dinov2ForImageClassification": hugging("Dinov2ForImageClassification", **_dinov2, **_dinov2_case, **LABELS),
    "Dinov2WithRegistersModel": hugging("Dinov2WithRegistersModel", num_register_tokens=3, **_dinov2, **_dinov2_case),
    "Dinov2WithRegistersModel, SwiGLU": hugging(
        "Dinov2WithRegistersModel", num_register_tokens=3, use_swiglu_ffn=True, **_dinov2, **_dinov2_case
    ),
    "Dinov2WithRegistersForImageClassification": hugging(
        "Dinov2WithRegistersForImageClassification", num_register_tokens=3, **_dinov2, **_dinov2_case, **LABELS
    ),
    "DINOv3ViTModel": hugging("DINOv3ViTModel", num_register_tokens=3, case=_any_size),
    "DINOv3ViTModel, gated MLP, no registers": hugging(
        "DINOv3ViTModel", use_gated_mlp=True, hidden_act="silu", rope_theta=50.0, case=_any_size
    ),
    "DINOv3ViTModel without biases": hugging(
        "DINOv3ViTModel", query_bias=False, value_bias=False, proj_bias=False, mlp_bias=False, case=_any_size
    ),
    "DINOv3ViTModel with a key's bias, non-square image": hugging(
        "DINOv3ViTModel", native=NATIVE, num_register_tokens=2, key_bias=True, query_bias=False, case=_any_size
    ),
    "InternVLVisionModel, mean": hugging(
        "InternVLVisionModel", case=_unnormed | _any_size | {"pooled": lambda x: x[:, 1:].mean(1)}, **_internvl
    ),
    "InternVLVisionModel, [CLS], q/k norm, RMSNorm": hugging(
        "InternVLVisionModel",
        use_mean_pooling=False,
        use_qk_norm=True,
        norm_type="rms_norm",
        attention_bias=True,
        use_mask_token=True,
        case=_any_size,
        **_internvl,
    ),
    "InternVLVisionModel without positions, q/k norm": hugging(
        "InternVLVisionModel",
        use_mean_pooling=False,
        use_qk_norm=True,
        use_absolute_position_embeddings=False,
        case=_any_size,
        **_internvl,
    ),
    "Aimv2VisionModel": hugging("Aimv2VisionModel", other=None, **_aimv2),
    "Aimv2VisionModel, biases": hugging("Aimv2VisionModel", other=None, qkv_bias=True, mlp_bias=True, **_aimv2),
    "Aimv2VisionModel, native sizes": hugging("Aimv2VisionModel", **_native_aimv2),
    "Aimv2VisionModel, native sizes, no head": hugging(
        "Aimv2VisionModel", use_head=False, **_native_aimv2 | {"case": _any_size | {"pooled": _mean}}
    ),
    "Aimv2Model": hugging("Aimv2Model", other=None, **_whole, **_aimv2),
}

# timm ----------------------------------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "patch_size": 8,
    "num_classes": 7,
    "norm_layer": partial(nn.LayerNorm, eps=1e-2),
}


def timmed(name: str = "vit_tiny_patch16_224", source_class: str = "VisionTransformer", **options: Any) -> Case:
    def make(size: tuple[int, int]) -> nn.Module:
        arguments = TINY | {"img_size": size, "dynamic_img_size": True} | options
        return timm.create_model(name, pretrained=False, **arguments)

    return Case("timm", make, source_class)


def eva(name: str, **options: Any) -> Case:
    """A model of timm's class Eva."""
    return timmed(name, "Eva", **options)


RMS = partial(RmsNorm, eps=1e-2)

TIMM = {
    "timm supervised": timmed(),
    "timm without qkv bias": timmed(qkv_bias=False),
    "timm average pooling": timmed(global_pool="avg", fc_norm=False),
    "timm average pooling without [CLS]": timmed(global_pool="avg", fc_norm=False, class_token=False),
    "timm head on every token": timmed(global_pool=""),
    "timm tanh GELU": timmed(act_layer="gelu_tanh"),
    "timm without final norm": timmed(final_norm=False),
    "timm DeiT": timmed("deit_tiny_patch16_224"),
    "timm DeiT distilled": replace(
        timmed("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"), exports=False
    ),
    "timm CLIP": timmed("vit_base_patch16_clip_224"),
    "timm CLIP quick_gelu": timmed("vit_base_patch16_clip_quickgelu_224"),
    "timm DINO": timmed("vit_small_patch16_224", num_classes=0),
    "timm DINOv2": timmed("vit_small_patch14_dinov2", num_classes=0, init_values=0.5),
    "timm DINOv2 reg4": timmed("vit_small_patch14_reg4_dinov2", num_classes=0, reg_tokens=4, no_embed_class=True),
    "timm registers with positions": timmed(reg_tokens=4),
    "timm non-square patch": timmed(patch_size=(8, 4)),
    "timm average pooling with fc_norm": timmed(global_pool="avg"),
    "timm average pooling over prefix tokens too": timmed(global_pool="avg", pool_include_prefix=True),
    "timm no positions": timmed(pos_embed="none"),
    "timm no bias in sublayers": timmed(qkv_bias=False, proj_bias=False),
    "timm RMSNorm, q/k norm": timmed("test_vit4", norm_layer=RMS, qk_norm=True),
    "timm q/k norm and inner norms": timmed(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "timm attention pooling over all tokens": timmed(global_pool="map", pool_include_prefix=True, fc_norm=True),
    "timm SwiGLU, packed": timmed(mlp_layer=SwiGLUPacked, scale_mlp_norm=True),
    "timm DeiT-III": timmed("deit3_small_patch16_224", init_values=0.5),
    "timm so150m reg4 gap": timmed("vit_so150m_patch16_reg4_gap_256"),
    "timm so150m reg4 map": timmed("vit_so150m_patch16_reg4_map_256"),
    "timm betwixt reg1 gap": timmed("vit_betwixt_patch16_reg1_gap_256", init_values=0.5),
    "timm SigLIP": timmed("vit_base_patch16_siglip_224", num_classes=0),
    "timm SigLIP so400m gap": timmed("vit_so400m_patch14_siglip_gap_224", num_classes=0, mlp_ratio=4),
    "timm DINOv2 giant": timmed("vit_giant_patch14_dinov2", num_classes=0, init_values=0.5),
    "timm AIMv2": timmed("aimv2_large_patch14_224", norm_layer=RMS, embed_norm_layer=RMS),
    "timm BEiT-3": timmed("beit3_base_patch16_224"),
    "timm RADIO": timmed("vit_base_patch16_radio_v3", num_classes=0),
    "timm EVA": eva("eva_giant_patch14_224"),
    "timm EVA-02 tiny": eva("eva02_tiny_patch14_224"),
    "timm EVA-02 base": eva("eva02_base_patch14_224"),
    "timm EVA-02 CLIP": eva("eva02_base_patch16_clip_224"),
    "timm DINOv3": eva("vit_small_patch16_dinov3", num_classes=0, init_values=0.5),
    "timm DINOv3 with SwiGLU and biases": eva("vit_small_plus_patch16_dinov3_qkvb", num_classes=0, init_values=0.5),
    "timm Perception Encoder core": eva("vit_pe_core_tiny_patch16_384"),
    "timm Perception Encoder spatial": eva("vit_pe_spatial_small_patch16_512", num_classes=0),
    "timm Perception Encoder lang": eva("vit_pe_lang_large_patch14_448", num_classes=0, init_values=0.5),
    "timm RoPE reg1 gap": eva("vit_medium_patch16_rope_reg1_gap_256"),
    "timm axial RoPE": eva("vit_small_patch16_rope_224"),
    "timm mixed RoPE": eva("vit_small_patch16_rope_mixed_224"),
    "timm mixed RoPE, rows first, and positions": eva("vit_small_patch16_rope_mixed_ape_224", rope_grid_indexing="ij"),
    "timm Sapiens 2": eva("vit_base_patch16_sapiens2", num_classes=0, num_kv_heads=4, norm_layer=RMS, init_values=0.5),
    "timm RoPE with everything else": eva(
        "vit_small_patch16_rope_224",
        qkv_fused=False,
        qk_norm=True,
        scale_attn_inner=True,
        init_values=0.5,
        attn_only_layer_scale=True,
        num_reg_tokens=2,
        rope_type="dinov3",
        rope_grid_offset=0.25,
        rope_grid_indexing="xy",
        rope_rotate_half=True,
        rope_temperature=50.0,
    ),
}

# open_clip -----------------------------------------------------------------------------------------------------------


TINY_CLIP = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1},
}


def clip_model(size: tuple[int, int] | int, quick_gelu: bool = False, **vision: Any) -> nn.Module:
    """A small CLIP of open_clip."""
    vision = TINY_CLIP["vision_cfg"] | {"image_size": size} | vision
    return open_clip.CLIP(**TINY_CLIP | {"vision_cfg": vision, "quick_gelu": quick_gelu}).eval()


def clipped(make: Callable[..., nn.Module] = clip_model, **options: Any) -> Case:
    make = partial(make, **options)

    def resize(module: nn.Module, size: tuple[int, int]) -> nn.Module:
        """open_clip has no dynamic size: build for the other size, and let its own loader resample the positions."""
        resized = make(size)
        state = dict(module.state_dict())
        resize_pos_embed(state, resized)
        resized.load_state_dict(state)
        return resized

    return Case("open_clip", make, "VisionTransformer", SQUARE, resize)


_pooler = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5}
"""CoCa's; open_clip's default of 256 queries is much for a test."""


def coca_model(size: tuple[int, int] | int, embed_dim: int = 24, **vision: Any) -> nn.Module:
    """A small CoCa of open_clip, whose tower returns its tokens too."""
    vision = TINY_CLIP["vision_cfg"] | {"image_size": size, "output_tokens": True} | _pooler | vision
    text = TINY_CLIP["text_cfg"] | {"embed_cls": True, "output_tokens": True}
    multimodal = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1}
    return open_clip.CoCa(embed_dim, multimodal, text, vision).eval()


def custom_text_model(size: tuple[int, int] | int, **vision: Any) -> nn.Module:
    """A small open_clip model whose text tower is a module of its own."""
    described = TINY_CLIP | {"vision_cfg": TINY_CLIP["vision_cfg"] | {"image_size": size} | vision}
    return open_clip.CustomTextCLIP(**described).eval()


def towered(
    trunk: str = "vit_tiny_patch16_224",
    inner: str = "VisionTransformer",
    *,
    pool: str = "token",
    proj: str | None = None,
    **options: Any,
) -> Case:
    """open_clip's TimmModel around a small trunk of timm's class `inner`, which it takes no options for."""

    def make(size: tuple[int, int]) -> nn.Module:
        tower = open_clip.timm_model.TimmModel("test_vit", embed_dim=24, pool=pool, proj=proj)
        arguments = {"num_classes": 0 if proj else 24, "img_size": size, "dynamic_img_size": True} | options
        tower.trunk = timm.create_model(trunk, **TINY | arguments)
        if proj == "linear":
            tower.head.proj = nn.Linear(32, 24, bias=False)
        return tower.eval()

    source_class = f"TimmModel with {inner}" + (" and projection" if proj == "linear" else "")
    return Case("open_clip", make, source_class)


OPEN_CLIP = {
    "open_clip OpenAI quick_gelu": clipped(quick_gelu=True),
    "open_clip LAION GELU": clipped(),
    "open_clip LayerScale": clipped(ls_init_value=0.5),
    "open_clip average pooling": clipped(pool_type="avg"),
    "open_clip without ln_pre": clipped(no_ln_pre=True),
    "open_clip norm after pooling": clipped(final_ln_after_pool=True),
    "open_clip norm after average pooling": clipped(final_ln_after_pool=True, pool_type="avg"),
    "open_clip sines and cosines": replace(clipped(pos_embed_type="sin_cos_2d"), other=(56, 56)),
    "open_clip CoCa": clipped(coca_model),
    "open_clip attentional pooling, equal widths": clipped(coca_model, embed_dim=32),
    "open_clip text tower of its own": clipped(custom_text_model),
    "open_clip TimmModel": towered(),
    "open_clip TimmModel without head, average pooling": towered(proj="none", global_pool="avg", fc_norm=False),
    "open_clip TimmModel, projection": towered(proj="linear"),
    "open_clip SigLIP": towered("vit_base_patch16_siglip_224", proj="none"),
    "open_clip EVA-02 CLIP": towered("eva02_base_patch16_clip_224", "Eva"),
    "open_clip EVA-02 CLIP, projection": towered("eva02_base_patch16_clip_224", "Eva", proj="linear"),
    "open_clip TimmModel, registers": towered(proj="linear", reg_tokens=4, no_embed_class=True, init_values=0.5),
}

# torch.hub -----------------------------------------------------------------------------------------------------------


def hubbed(library: str, **options: Any) -> Case:
    kinds = {"dino": hub_models.VisionTransformer, "dinov2": hub_models.DinoVisionTransformer}
    source_class = kinds[library].__name__ + (" with SwiGLU" if options.get("gated") else "")
    make = lambda size: kinds[library](size[0], **options)  # noqa: E731
    return Case(library, make, source_class, SQUARE)


TORCH_HUB = {
    "DINO": hubbed("dino"),
    "DINOv2": hubbed("dinov2"),
    "DINOv2 with registers": hubbed("dinov2", registers=4),
    "DINOv2 with SwiGLU and registers": hubbed("dinov2", registers=4, gated=True),
    "DINOv2 with SwiGLU": hubbed("dinov2", gated=True),
}

CASES = TRANSFORMERS | TIMM | OPEN_CLIP | TORCH_HUB
