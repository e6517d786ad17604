"""The zoo: published architectures from torchvision, transformers and timm, tiny and with random weights.

A row says how to build one, what to feed it, and the names of its head and of one layer inside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
import transformers as hf
from timm.models import (
    cait,
    coat,
    convmixer,
    crossvit,
    deit,
    edgenext,
    ghostnet,
    levit,
    metaformer,
    mlp_mixer,
    mobilenetv3,
    resnet,
    starnet,
    xcit,
)
from timm.models import swin_transformer as swin
from timm.models import vision_transformer as vit
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CLASSES = 5
IGNORED = -100
BATCH_NORM = nn.modules.batchnorm._BatchNorm

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        batch: what to feed it, as keyword arguments; with `labels`.
        head: name of the last layer.
        inner: name of one before it: a module, or a parameter where the module is of the library's own.
        loss: the loss and the logits.
        shifted: whether each position's label is that of the next one (language models).
        scale: what the head's outputs are multiplied with on their way to the softmax.
        rows: the head's inputs that get a softmax.
    """

    name: str
    build: Callable[[], nn.Module] = field(repr=False)
    batch: Callable[[], Batch] = field(repr=False)
    head: str
    inner: str
    loss: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]] = field(repr=False)
    shifted: bool = False
    scale: float = 1.0
    rows: Callable[[Tensor], Tensor] = lambda phi: phi

    def problem(self) -> tuple[nn.Module, Batch]:
        """The network in float64 and eval mode, and its batch.

        What starts at zero (LayerScale, the last gain of a residual branch, some heads) is moved, or there
        would be nothing to see behind it. BatchNorm has seen the batch, or deep networks would fade.
        """
        model, batch = self.build().double().train(), self.batch()
        norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
        with torch.no_grad():
            for p in model.parameters():
                if p.squeeze().dim() <= 1 or not p.any():
                    p.add_(torch.randn_like(p), alpha=0.1)
            if norms:
                momenta = [norm.momentum for norm in norms]
                for norm in norms:
                    norm.momentum = 1.0
                self.loss(model, batch)
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
                    norm.running_var.clamp_(min=0.1)
        return model.eval(), batch

    def targets(self, batch: Batch) -> Tensor:
        """The class of every softmax."""
        labels = batch["labels"]
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shifted else labels


class InFloat64(TorchFunctionMode):
    """A network's own casts to float32 become casts to float64, for finite differences."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------------- images


def images(n: int = 4) -> Batch:
    return {"x": torch.randn(n, 3, 32, 32, dtype=torch.float64), "labels": torch.randint(CLASSES, (n,))}


def cross_entropy(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    logits = model(batch["x"])
    return F.cross_entropy(logits, batch["labels"]), logits


def of_images(
    name: str, make: Callable[..., nn.Module], head: str, inner: str, /, scale: float = 1.0, **config: Any
) -> Row:
    build = partial(make, num_classes=CLASSES, **config)
    return Row(name, build, images, head, inner, cross_entropy, scale=scale)


def torchvision(name: str, *row: Any, **config: Any) -> Row:
    return of_images(f"torchvision-{name}", *row, **config)


def from_timm(name: str, *row: Any, **config: Any) -> Row:
    return of_images(f"timm-{name}", *row, **config)


def registered(name: str, head: str, inner: str, /) -> Row:
    """A small member of a family, by its name in timm's registry."""
    return from_timm(name, partial(timm.create_model, name), head, inner)


def mobilenet_v3(**config: Any) -> nn.Module:
    blocks = [
        tv.mobilenetv3.InvertedResidualConfig(*block, 1.0)
        for block in [(8, 3, 8, 8, True, "RE", 2, 1), (8, 3, 16, 12, True, "HS", 2, 1)]
    ]
    return tv.MobileNetV3(blocks, last_channel=24, **config)


def efficientnet_v1(**config: Any) -> nn.Module:
    block = tv.efficientnet.MBConvConfig
    blocks = [block(1, 3, 1, 8, 8, 1, 1.0, 1.0), block(2, 3, 2, 8, 12, 2, 1.0, 1.0)]
    return tv.EfficientNet(blocks, dropout=0.2, last_channel=24, **config)


def convnext(**config: Any) -> nn.Module:
    block = tv.convnext.CNBlockConfig
    return tv.ConvNeXt([block(8, 12, 1), block(12, None, 1)], **config)


def regnet(**config: Any) -> nn.Module:
    widths = tv.regnet.BlockParams.from_init_params(
        depth=4, w_0=8, w_a=8.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return tv.RegNet(widths, stem_width=8, **config)


TV_VIT = {"image_size": 32, "patch_size": 16, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
TV_SWIN = {
    "patch_size": [4, 4],
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": [4, 4],
}

TORCHVISION = [
    torchvision("resnet", tv.ResNet, "fc", "layer4.0.downsample.0",
                block=tv.resnet.BasicBlock, layers=[1, 1, 1, 1]),
    torchvision("mobilenet_v2", tv.MobileNetV2, "classifier.1", "features.3.conv.2",
                inverted_residual_setting=[[1, 8, 1, 1], [2, 12, 2, 2]], width_mult=0.25),
    torchvision("mobilenet_v3", mobilenet_v3, "classifier.3", "features.2.block.2.fc1"),
    torchvision("mobilenet_v3-classifier", mobilenet_v3, "classifier.3", "classifier.0"),
    torchvision("efficientnet", efficientnet_v1, "classifier.1", "features.2.0.block.2.fc1"),
    torchvision("shufflenet_v2", tv.ShuffleNetV2, "fc", "stage2.0.branch2.0",
                stages_repeats=[1, 1, 1], stages_out_channels=[8, 12, 16, 24, 28]),
    torchvision("densenet", tv.DenseNet, "classifier", "features.denseblock2.denselayer1.conv1",
                growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2),
    torchvision("convnext", convnext, "classifier.2", "features.1.0.block.3"),
    torchvision("regnet", regnet, "fc", "trunk_output.block2.block2-0.f.a.0"),
    torchvision("swin", tv.SwinTransformer, "head", "features.1.1.mlp.0", **TV_SWIN),
    torchvision("swin_v2", tv.SwinTransformer, "head", "features.1.0.mlp.3", **TV_SWIN,
                block=tv.swin_transformer.SwinTransformerBlockV2,
                downsample_layer=tv.swin_transformer.PatchMergingV2),
    torchvision("vit", tv.VisionTransformer, "heads.head", "encoder.layers.encoder_layer_0.mlp.0", **TV_VIT),
    torchvision("vit-hidden-head", tv.VisionTransformer, "heads.head", "heads.pre_logits", **TV_VIT,
                representation_size=6),
    torchvision("maxvit", tv.MaxVit, "classifier.5", "blocks.0.layers.0.layers.window_attention.mlp_layer.1",
                input_size=(32, 32), stem_channels=8, block_channels=[8], block_layers=[1], head_dim=4,
                stochastic_depth_prob=0.0, partition_size=4),
]  # fmt: skip


def mobilenet_v4(**config: Any) -> nn.Module:
    inverted = ["uir_r1_a3_k3_s2_e2_c12", "uir_r1_a0_k3_s1_e2_c12"]
    blocks = [["cn_r1_k3_s2_e1_c8"], inverted, ["cn_r1_k1_s1_c16"]]
    return mobilenetv3.MobileNetV3(
        decode_arch_def(blocks), stem_size=8, num_features=24, head_norm=True, act_layer=nn.ReLU, **config
    )


TIMM_VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 2}

TIMM = [
    from_timm("resnet", resnet.ResNet, "fc", "layer4.0.downsample.0",
              block=resnet.BasicBlock, layers=(1, 1, 1, 1), channels=(8, 12, 16, 24), stem_width=8),
    registered("mobilenetv3_small_050", "classifier", "blocks.4.2.se.conv_reduce"),
    from_timm("mobilenetv4", mobilenet_v4, "classifier", "conv_head"),
    from_timm("ghostnet", ghostnet.GhostNet, "classifier", "blocks.1.0.se.conv_reduce",
              cfgs=[[[3, 16, 8, 0.25, 1]], [[3, 24, 12, 0.25, 2]]], width=0.5),
    registered("lcnet_035", "classifier", "blocks.5.1.se.conv_reduce"),
    from_timm("starnet", starnet.StarNet, "head", "stages.1.1.f1.conv",
              base_dim=8, depths=[1, 1, 1, 1], mlp_ratio=2),
    from_timm("coat_lite", coat.CoaT, "head", "cpe4.proj",
              img_size=32, patch_size=4, embed_dims=(8, 8, 8, 16), serial_depths=(1, 1, 1, 2), num_heads=2,
              mlp_ratios=(2, 2, 2, 2), crpe_window={3: 2}),
    from_timm("coat_parallel", coat.CoaT, "head", "parallel_blocks.0.mlp2.fc1",
              img_size=32, patch_size=4, embed_dims=(8, 8, 8, 8), serial_depths=(1, 1, 1, 1), num_heads=2,
              mlp_ratios=(2, 2, 2, 2), crpe_window={3: 2}, parallel_depth=1),
    from_timm("mixer", mlp_mixer.MlpMixer, "head", "blocks.0.mlp_channels.fc1",
              img_size=32, patch_size=16, num_blocks=1, embed_dim=8),
    from_timm("convmixer", convmixer.ConvMixer, "head", "blocks.0.1", dim=8, depth=1, kernel_size=3),
    from_timm("levit", levit.Levit, "head.linear", "stages.0.blocks.0.mlp.ln1.linear",
              img_size=32, embed_dim=(16,), key_dim=4, depth=(1,), num_heads=(2,)),
    from_timm("levit_distilled", levit.LevitDistilled, "head.linear", "stages.0.blocks.0.attn.proj.ln.linear",
              img_size=32, embed_dim=(16,), key_dim=4, depth=(1,), num_heads=(2,), scale=0.5),
    from_timm("vit", vit.VisionTransformer, "head", "blocks.0.mlp.fc1", **TIMM_VIT),
    from_timm("deit_distilled", deit.VisionTransformerDistilled, "head", "blocks.0.attn.proj",
              **TIMM_VIT, scale=0.5),
    from_timm("poolformer", metaformer.MetaFormer, "head.fc", "stages.1.blocks.0.mlp.fc1",
              depths=(1, 1), dims=(8, 12), use_mlp_head=False),
    from_timm("caformer", metaformer.MetaFormer, "head.fc.fc2", "head.fc.fc1", depths=(1, 1), dims=(8, 32),
              token_mixers=(metaformer.SepConv, metaformer.Attention),
              norm_layers=[metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias]),
    from_timm("edgenext", edgenext.EdgeNeXt, "head.fc", "stages.1.blocks.1.mlp.fc1",
              dims=(8, 16, 16, 16), depths=(1, 2, 1, 1), kernel_sizes=(3, 3, 3, 3), heads=(2, 2, 2, 2),
              d2_scales=(2, 2, 2, 2)),
    from_timm("xcit", xcit.Xcit, "head", "blocks.0.mlp.fc1",
              img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, cls_attn_layers=1),
    from_timm("cait", cait.Cait, "head", "blocks.0.attn.proj_w", **TIMM_VIT),
    from_timm("crossvit", crossvit.CrossVit, "head.0", "blocks.0.fusion.0.attn.proj",
              img_size=32, patch_size=(8, 16), embed_dim=(8, 12), depth=((1, 1, 0),), num_heads=(2, 2),
              mlp_ratio=(2., 2., 1.), scale=0.5),
    from_timm("swin", swin.SwinTransformer, "head.fc", "layers.1.blocks.0.mlp.fc1", img_size=32, embed_dim=8,
              depths=(1, 1), num_heads=(2, 2), window_size=4),
]  # fmt: skip


# --------------------------------------------------------------------------------- words and sounds

VOCABULARY, LENGTH = 23, 7


def words() -> Batch:
    """Two sentences, the second of which is padded, and a label for each."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -2:] = 0
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))  # none of the special words
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(CLASSES, (2,))}


def tags(low: int = 0, high: int = CLASSES) -> Batch:
    """A label for every word."""
    batch = words()
    labels = torch.randint(low, high, (2, LENGTH)).masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch | {"labels": labels}


sentences = partial(tags, 3, VOCABULARY)
"""A word for every word."""


def own_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss that the model itself computes."""
    out = model(**batch)
    return out.loss, out.logits


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_labels": CLASSES,
    "initializer_range": 0.5, "init_std": 0.5,
}  # fmt: skip


def transformer(
    model: str,
    head: str,
    inner: str,
    /,
    *,
    batch: Callable[[], Batch] = words,
    shifted: bool = False,
    scale: float = 1.0,
    rows: Callable[[Tensor], Tensor] = lambda phi: phi,
    **config: Any,
) -> Row:
    def build() -> nn.Module:
        kind = getattr(hf, model)
        network = kind(kind.config_class(**SMALL | config))
        if hasattr(network, "final_logits_bias"):  # zero until somebody resizes the vocabulary
            nn.init.normal_(network.final_logits_bias)
        return network

    return Row(f"transformers-{model}", build, batch, head, inner, own_loss, shifted, scale, rows)


def language_model(model: str, head: str, inner: str, /, **config: Any) -> Row:
    """A network whose every position predicts the next word."""
    return transformer(model, head, inner, batch=sentences, shifted=True, **config)


def translator(model: str, head: str, inner: str, /, **config: Any) -> Row:
    """One with an encoder and a decoder, whose labels are another sentence."""
    return transformer(model, head, inner, batch=sentences, **config)


def tagger(model: str, head: str, inner: str, /, **config: Any) -> Row:
    return transformer(model, head, inner, batch=tags, **config)


def sound() -> Batch:
    return {"input_values": torch.randn(2, 120, dtype=torch.float64), "labels": torch.randint(CLASSES, (2,))}


def pixels() -> Batch:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    return {"pixel_values": x, "labels": torch.randint(CLASSES, (2,))}


def last(phi: Tensor) -> Tensor:
    """The last word of every sentence that is none of the padding's."""
    return phi[:, -1]


BIDIRECTIONAL = "encoder.layer.0.attention.output.dense"
DECODER = "model.layers.0.mlp.up_proj"
BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 12, "n_positions": 16}
SPEECH = {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_conv_pos_embeddings": 4,
          "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "classifier_proj_size": 6,
          "vocab_size": VOCABULARY}  # fmt: skip

TRANSFORMERS = [
    transformer("BertForSequenceClassification", "classifier", f"bert.{BIDIRECTIONAL}"),
    tagger("BertForTokenClassification", "classifier", "bert.encoder.layer.0.attention.self.query"),
    transformer("BertForMaskedLM", "cls.predictions.decoder", "cls.predictions.transform.dense",
                batch=sentences),
    transformer("AlbertForSequenceClassification", "classifier",
                "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn",
                num_hidden_layers=2, embedding_size=6),
    transformer("RobertaForSequenceClassification", "classifier.out_proj", "classifier.dense"),
    transformer("DistilBertForSequenceClassification", "classifier",
                "distilbert.transformer.layer.0.ffn.lin1", dim=8, hidden_dim=12, n_layers=1, n_heads=2),
    transformer("DebertaV2ForSequenceClassification", "classifier", f"deberta.{BIDIRECTIONAL}",
                relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"]),
    tagger("ElectraForTokenClassification", "classifier", f"electra.{BIDIRECTIONAL}", embedding_size=6),
    language_model("GPT2LMHeadModel", "lm_head", "transformer.h.0.mlp.c_fc.weight", **GPT2),
    transformer("GPT2ForSequenceClassification", "score", "transformer.h.0.mlp.c_fc.weight",
                **GPT2, rows=last),
    language_model("LlamaForCausalLM", "lm_head", DECODER),
    transformer("LlamaForSequenceClassification", "score", DECODER, rows=last),
    language_model("MistralForCausalLM", "lm_head", "model.layers.0.self_attn.o_proj", num_key_value_heads=1),
    language_model("CohereForCausalLM", "lm_head", DECODER, logit_scale=0.25, scale=0.25),
    language_model("GraniteForCausalLM", "lm_head", DECODER, logits_scaling=4.0, scale=0.25),
    language_model("Qwen3ForCausalLM", "lm_head", DECODER, head_dim=4, num_key_value_heads=1),
    translator("BartForConditionalGeneration", "lm_head", "model.decoder.layers.0.fc1", **BART,
               decoder_start_token_id=2),
    translator("T5ForConditionalGeneration", "lm_head", "decoder.block.0.layer.2.DenseReluDense.wi",
               d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, decoder_start_token_id=0),
    transformer("ViTForImageClassification", "classifier", "vit.layers.0.mlp.fc1", batch=pixels,
                image_size=32, patch_size=16),
    transformer("Wav2Vec2ForSequenceClassification", "classifier", "projector", batch=sound, **SPEECH),
]  # fmt: skip

ROWS = TORCHVISION + TIMM + TRANSFORMERS
SPEECH_TO_TEXT = transformer(
    "Wav2Vec2ForCTC",
    "lm_head",
    "lm_head",
    batch=lambda: sound() | {"labels": torch.randint(3, VOCABULARY, (2, 3))},
    **SPEECH,
)
