"""Models written by others, each in a small configuration with random weights and random data.

Nothing is downloaded. A package that is not installed has no cases.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
VOCABULARY = 48
TOKENS = 8


@dataclass(frozen=True)
class Case:
    """One model to try.

    Attributes:
        package: Where it comes from.
        make: Makes the model.
        batch: Of a number of examples, makes the inputs and the target.
        loss: Of output and target.
    """

    package: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[Any, Tensor], Tensor] = field(default=F.cross_entropy)


def cases() -> dict[str, Case]:
    """Name to case, of every package that can be imported."""
    found: dict[str, Case] = {}
    for package, listed in (
        ("torchvision", _torchvision),
        ("timm", _timm),
        ("transformers", _transformers),
    ):
        if importlib.util.find_spec(package) is not None:
            found |= {f"{package}: {name}": case for name, case in listed().items()}
    return found


def importable_torchvision() -> None:
    """Lets torchvision be imported where its compiled part does not load.

    The wheel on PyPI is linked against the CUDA build of torch. Its models are Python; only the
    detection operators are compiled, and the import fails as it describes two of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(library)


_KEPT: list[Any] = []  # a library's definitions end with it


# -- images ---------------------------------------------------------------------------------------


def _images(size: int, channels: int = 3) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, channels, size, size), torch.randint(CLASSES, (count,))

    return batch


class _Part(nn.Module):
    """A model, of whose output one part goes to the loss."""

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__()
        self.model = model
        self.part = part

    def forward(self, x: Tensor) -> Any:
        """That part of the output of ``x``."""
        return self.model(x)[self.part]


def _torchvision() -> dict[str, Case]:
    importable_torchvision()
    from torchvision import models
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.densenet import DenseNet
    from torchvision.models.maxvit import MaxVit
    from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2
    from torchvision.models.vision_transformer import VisionTransformer

    def case(size: int, make: Callable[..., nn.Module], *given: Any, **options: Any) -> Case:
        def model() -> nn.Module:
            return make(*given, num_classes=CLASSES, **options)

        return Case("torchvision", model, _images(size))

    def pixels(count: int) -> tuple[Tensor, Tensor]:
        return torch.randn(count, 3, 64, 64), torch.randint(CLASSES, (count, 64, 64))

    lraspp = Case(
        "torchvision",
        lambda: _Part(
            models.segmentation.lraspp_mobilenet_v3_large(
                weights=None, weights_backbone=None, num_classes=CLASSES
            ),
            "out",
        ),
        pixels,
    )
    swin: dict[str, Any] = {
        "patch_size": [2, 2],
        "embed_dim": 12,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": [4, 4],
    }
    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)]
    vit = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2}
    return {
        "resnet18": case(32, models.resnet18),
        "mobilenet_v2": case(32, models.mobilenet_v2),
        "mobilenet_v3_small": case(64, models.mobilenet_v3_small),
        "efficientnet_b0": case(64, models.efficientnet_b0),
        "shufflenet_v2_x0_5": case(64, models.shufflenet_v2_x0_5),
        "squeezenet1_1": case(64, models.squeezenet1_1),
        "mnasnet0_5": case(64, models.mnasnet0_5),
        "regnet_y_400mf": case(64, models.regnet_y_400mf),
        "googlenet": case(64, models.googlenet, aux_logits=False, init_weights=False),
        "DenseNet, small": case(
            32, DenseNet, growth_rate=8, block_config=(2, 2, 2), num_init_features=16
        ),
        "ConvNeXt, small": case(32, ConvNeXt, blocks, stochastic_depth_prob=0.1),
        "SwinTransformer, small": case(32, SwinTransformer, **swin),
        "SwinTransformer v2, small": case(
            32, SwinTransformer, block=SwinTransformerBlockV2, **swin
        ),
        "VisionTransformer, small": case(
            32, VisionTransformer, hidden_dim=32, mlp_dim=64, **vit
        ),
        "MaxVit, small": case(
            32, MaxVit, (32, 32), 16, 4, [16, 32], [1, 1], 16, 0.1
        ),
        "lraspp_mobilenet_v3_large": lraspp,
    }  # fmt: skip


def _timm() -> dict[str, Case]:
    importable_torchvision()
    import timm

    def case(size: int, name: str, **options: Any) -> Case:
        def model() -> nn.Module:
            made: nn.Module = timm.create_model(name, num_classes=CLASSES, **options)
            return made

        return Case("timm", model, _images(size))

    small: dict[str, Any] = {"depths": (1, 1, 1, 1)}
    return {
        "resnet10t": case(64, "resnet10t"),
        "test_efficientnet": case(64, "test_efficientnet"),
        "mobilenetv3_small_050": case(64, "mobilenetv3_small_050"),
        "lcnet_050": case(64, "lcnet_050"),
        "ghostnet_050": case(64, "ghostnet_050"),
        "tinynet_e": case(64, "tinynet_e"),
        "regnetx_002": case(64, "regnetx_002"),
        "test_convnext": case(64, "test_convnext"),
        "convnextv2_atto, 4 blocks": case(64, "convnextv2_atto", **small),
        "test_vit": case(32, "test_vit", img_size=32),
        "test_mambaout": case(64, "test_mambaout"),
        "test_nfnet": case(64, "test_nfnet"),
        "test_byobnet": case(64, "test_byobnet"),
        "swin_tiny, 2 stages": case(
            32, "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4,
            embed_dim=24, depths=(2, 2), num_heads=(2, 4),
        ),
        "mixer_s32, 2 blocks": case(
            64, "mixer_s32_224", img_size=64, num_blocks=2, embed_dim=64
        ),
        "poolformer_s12, 4 blocks": case(
            64, "poolformer_s12", layers=(1, 1, 1, 1), embed_dims=(16, 24, 32, 48)
        ),
        "mobilevit_xxs": case(64, "mobilevit_xxs"),
        "pvt_v2_b0, 4 blocks": case(64, "pvt_v2_b0", **small),
        "edgenext_xx_small": case(64, "edgenext_xx_small"),
        "repvgg_a0": case(32, "repvgg_a0"),
    }  # fmt: skip


# -- text and sound -------------------------------------------------------------------------------


class _Logits(nn.Module):
    """A Hugging Face model whose output is the logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Any:
        """Logits of the batch."""
        return self.model(**batch).logits


def _token_loss(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def _tokens(count: int, length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length))


def _text(count: int) -> dict[str, Tensor]:
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (count, 1))
    mask = (torch.arange(TOKENS) < lengths).long()
    return {"input_ids": _tokens(count) * mask, "attention_mask": mask}


def _classified(count: int) -> dict[str, Tensor]:
    return {**_text(count), "y": torch.randint(2, (count,))}


def _next(count: int) -> dict[str, Tensor]:
    return {**_text(count), "y": _tokens(count)}


def _translated(count: int) -> dict[str, Tensor]:
    return {**_text(count), "decoder_input_ids": _tokens(count, 6), "y": _tokens(count, 6)}


def _spoken(count: int) -> dict[str, Tensor]:
    features = torch.randn(count, 8, 16)
    return {"input_features": features, "decoder_input_ids": _tokens(count, 6),
            "y": _tokens(count, 6)}  # fmt: skip


def _seen(count: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 32, 32), "y": torch.randint(2, (count,))}


_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def _transformers() -> dict[str, Case]:
    importable_torchvision()
    import transformers as hf

    def case(name: str, batch: Any, loss: Any = F.cross_entropy, **sizes: Any) -> Case:
        def model() -> nn.Module:
            architecture = getattr(hf, name)
            config = architecture.config_class(**sizes)
            config.use_cache = False
            # torch's grouped product, the default, can only be traced in bfloat16.
            config._experts_implementation = "batched_mm"
            return _Logits(architecture(config))

        return Case("transformers", model, batch, loss)

    def decoder(name: str, **sizes: Any) -> Case:
        return case(name, _next, _token_loss, **{**_SIZES, "pad_token_id": 0, **sizes})

    def encoder(name: str, **sizes: Any) -> Case:
        return case(name, _classified, **{**_SIZES, **sizes})

    grouped = {"num_key_value_heads": 1}
    seq2seq = {"vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
               "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
               "decoder_ffn_dim": 32, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 32, "image_size": 32, "patch_size": 8}  # fmt: skip
    return {
        "BertForSequenceClassification": encoder("BertForSequenceClassification"),
        "BertForMaskedLM": case("BertForMaskedLM", _next, _token_loss, **_SIZES),
        "RobertaForSequenceClassification": encoder("RobertaForSequenceClassification"),
        "DistilBertForSequenceClassification": case(
            "DistilBertForSequenceClassification", _classified, vocab_size=VOCABULARY, dim=16,
            hidden_dim=32, n_layers=2, n_heads=2,
        ),
        "ElectraForSequenceClassification": encoder("ElectraForSequenceClassification"),
        "AlbertForSequenceClassification": encoder(
            "AlbertForSequenceClassification", embedding_size=8
        ),
        "DebertaV2ForSequenceClassification": encoder(
            "DebertaV2ForSequenceClassification", relative_attention=True,
            position_biased_input=False, pos_att_type=["p2c", "c2p"],
        ),
        "GPT2LMHeadModel": case(
            "GPT2LMHeadModel", _next, _token_loss, vocab_size=VOCABULARY, n_embd=16, n_layer=2,
            n_head=2, n_positions=32,
        ),
        "GPTNeoXForCausalLM": decoder("GPTNeoXForCausalLM"),
        "OPTForCausalLM": decoder(
            "OPTForCausalLM", ffn_dim=32, word_embed_proj_dim=16
        ),
        "LlamaForCausalLM": decoder("LlamaForCausalLM", **grouped),
        "MistralForCausalLM": decoder("MistralForCausalLM", **grouped),
        "Qwen2ForCausalLM": decoder("Qwen2ForCausalLM", **grouped),
        "GemmaForCausalLM": decoder("GemmaForCausalLM", head_dim=8, **grouped),
        "PhiForCausalLM": decoder("PhiForCausalLM"),
        "MixtralForCausalLM": decoder(
            "MixtralForCausalLM", num_local_experts=2, num_experts_per_tok=1, **grouped
        ),
        "MambaForCausalLM": case(
            "MambaForCausalLM", lambda n: {"input_ids": _tokens(n), "y": _tokens(n)}, _token_loss,
            vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1,
        ),
        "T5ForConditionalGeneration": case(
            "T5ForConditionalGeneration", _translated, _token_loss, vocab_size=VOCABULARY,
            d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0,
        ),
        "BartForConditionalGeneration": case(
            "BartForConditionalGeneration", _translated, _token_loss,
            max_position_embeddings=32, **seq2seq,
        ),
        "WhisperForConditionalGeneration": case(
            "WhisperForConditionalGeneration", _spoken, _token_loss, num_mel_bins=8,
            max_source_positions=8, max_target_positions=16, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, **seq2seq,
        ),
        "ViTForImageClassification": case("ViTForImageClassification", _seen, **vision),
        "DeiTForImageClassification": case("DeiTForImageClassification", _seen, **vision),
        "ConvNextForImageClassification": case(
            "ConvNextForImageClassification", _seen, hidden_sizes=[8, 16], depths=[1, 1],
            num_stages=2, patch_size=2,
        ),
        "SegformerForImageClassification": case(
            "SegformerForImageClassification", _seen, num_encoder_blocks=2, depths=[1, 1],
            sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
            num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
        ),
    }  # fmt: skip
