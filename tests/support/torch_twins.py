"""Reward networks in PyTorch, under the names of their published files, written from their papers'
descriptions: what no library in the tests' environment holds."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


def _random(*shape):
    """Small values, since `torch.empty` gives whatever lay in memory: sometimes NaN."""
    return 0.02 * torch.randn(shape)


# --- OpenAI's and open_clip's CLIP ----------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width, heads, activation, mlp_ratio=4.0):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        inner = int(width * mlp_ratio)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)}
        )
        self.activation = ACTIVATIONS[activation]

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, activation, mlp_ratio=4.0):
        super().__init__()
        self.resblocks = nn.ModuleList(
            [Block(width, heads, activation, mlp_ratio) for _ in range(layers)]
        )

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(
        self, width, layers, heads, patch, image_size, embed_dim, activation, mlp_ratio=4.0
    ):
        super().__init__()
        self.class_embedding = nn.Parameter(_random(width))
        self.positional_embedding = nn.Parameter(_random((image_size // patch) ** 2 + 1, width))
        self.proj = nn.Parameter(_random(width, embed_dim))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation, mlp_ratio)

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """Of a `model_cfg`."""

    def __init__(self, cfg):
        super().__init__()
        vision = {
            "layers": 12,
            "width": 768,
            "head_width": 64,
            "patch_size": 16,
            "image_size": 224,
            "mlp_ratio": 4.0,
        } | cfg["vision_cfg"]
        text = {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 512,
            "heads": 8,
            "layers": 12,
            "mlp_ratio": 4.0,
        } | cfg["text_cfg"]
        activation = "quick_gelu" if cfg.get("quick_gelu") else "gelu"
        width = text["width"]
        self.positional_embedding = nn.Parameter(_random(text["context_length"], width))
        self.text_projection = nn.Parameter(_random(width, cfg["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.visual = Vision(
            vision["width"],
            vision["layers"],
            vision["width"] // vision["head_width"],
            vision["patch_size"],
            vision["image_size"],
            cfg["embed_dim"],
            activation,
            vision["mlp_ratio"],
        )
        self.transformer = Transformer(
            width, text["layers"], text["heads"], activation, text["mlp_ratio"]
        )
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.ln_final = nn.LayerNorm(width)

    def image_features(self, images):
        return self.visual(images)

    def text_features(self, ids):
        length = ids.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


# --- BERT, with cross-attention where `context` says so -----------------------------------------


class BertSelf(nn.Module):
    def __init__(self, width, heads, context):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(context, width), nn.Linear(context, width)

    def forward(self, x, context, mask):
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(x), self.key(context), self.value(context))
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores + (1 - mask[:, None, None, :].to(scores)) * -10000.0
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class BertOutput(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    def __init__(self, width, heads, context):
        super().__init__()
        self.self, self.output = BertSelf(width, heads, context), BertOutput(width, width)

    def forward(self, x, context=None, mask=None):
        return self.output(self.self(x, x if context is None else context, mask), x)


class BertLayer(nn.Module):
    def __init__(self, width, heads, inner, context):
        super().__init__()
        self.attention = BertAttention(width, heads, width)
        if context:
            self.crossattention = BertAttention(width, heads, context)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = BertOutput(inner, width)

    def forward(self, x, mask, context):
        x = self.attention(x, mask=mask)
        if context is not None:
            x = self.crossattention(x, context)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    def __init__(self, vocab, width, layers, heads, inner, positions, types, context):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocab, width),
                "position_embeddings": nn.Embedding(positions, width),
                **({"token_type_embeddings": nn.Embedding(types, width)} if types else {}),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.encoder = nn.ModuleDict(
            {
                "layer": nn.ModuleList(
                    [BertLayer(width, heads, inner, context) for _ in range(layers)]
                )
            }
        )

    def forward(self, ids, context=None):
        parts, positions = self.embeddings, torch.arange(ids.shape[1], device=ids.device)
        x = parts["word_embeddings"](ids) + parts["position_embeddings"](positions)
        if "token_type_embeddings" in parts:
            x = x + parts["token_type_embeddings"].weight[0]
        x = parts["LayerNorm"](x)
        for layer in self.encoder["layer"]:
            x = layer(x, ids != 0, context)
        return x


# --- Chinese-CLIP by its authors ------------------------------------------------------------------


class CNCLIP(nn.Module):
    """Of cn_clip's two model configs, merged."""

    def __init__(self, cfg):
        super().__init__()
        width, vision = cfg["text_hidden_size"], cfg["vision_width"]
        self.visual = Vision(
            vision,
            cfg["vision_layers"],
            vision // cfg.get("vision_head_width", 64),
            cfg["vision_patch_size"],
            cfg.get("image_resolution", 224),
            cfg["embed_dim"],
            "quick_gelu",
        )
        self.bert = Bert(
            cfg["vocab_size"],
            width,
            cfg["text_num_hidden_layers"],
            cfg["text_num_attention_heads"],
            cfg["text_intermediate_size"],
            cfg.get("text_max_position_embeddings", 512),
            2,
            None,
        )
        self.text_projection = nn.Parameter(_random(width, cfg["embed_dim"]))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image_features(self, images):
        return self.visual(images)

    def text_features(self, ids):
        return self.bert(ids)[:, 0] @ self.text_projection


# --- ImageReward ----------------------------------------------------------------------------------


class BLIPBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)}
        )
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn["proj"](y)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class BLIPVision(nn.Module):
    def __init__(self, image_size, patch_size, width, layers, heads):
        super().__init__()
        self.cls_token = nn.Parameter(_random(1, 1, width))
        self.pos_embed = nn.Parameter(_random(1, (image_size // patch_size) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.blocks = nn.ModuleList([BLIPBlock(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def score_mlp(inputs):
    """As the aesthetic predictor and ImageReward have it, under `layers`."""
    dropout = nn.Dropout(0.2)
    return nn.ModuleDict(
        {
            "layers": nn.Sequential(
                nn.Linear(inputs, 1024),
                dropout,
                nn.Linear(1024, 128),
                dropout,
                nn.Linear(128, 64),
                nn.Dropout(0.1),
                nn.Linear(64, 16),
                nn.Linear(16, 1),
            )
        }
    )


def cycle_mlp(inputs):
    """As CycleReward has it, under `layers`."""
    widths = [inputs, 1024, 128, 64, 16, 1]
    layers = [(nn.Linear(a, b), nn.GELU()) for a, b in itertools.pairwise(widths)]
    return nn.ModuleDict({"layers": nn.Sequential(*itertools.chain(*layers))[:-1]})


class ImageReward(nn.Module):
    def __init__(self, vision, text):
        super().__init__()
        self.blip = nn.ModuleDict(
            {
                "visual_encoder": BLIPVision(**vision),
                "text_encoder": Bert(
                    text["vocab_size"],
                    text["hidden_size"],
                    text["num_hidden_layers"],
                    text["num_attention_heads"],
                    text["intermediate_size"],
                    text["max_position_embeddings"],
                    0,
                    vision["width"],
                ),
                "vision_proj": nn.Linear(vision["width"], 256),
                "text_proj": nn.Linear(text["hidden_size"], 256),
            }
        )
        self.mlp = score_mlp(text["hidden_size"])

    def forward(self, ids, images):
        tokens = self.blip["visual_encoder"](images)
        x = self.blip["text_encoder"](ids, tokens)[:, 0]
        return (self.mlp["layers"](x)[:, 0] - 0.16717362830052426) / 1.0333394966054072


class CycleReward(ImageReward):
    def __init__(self, vision, text):
        super().__init__(vision, text)
        self.mlp = cycle_mlp(text["hidden_size"])

    def forward(self, ids, images):
        x = self.blip["text_encoder"](ids, self.blip["visual_encoder"](images))[:, 0]
        return self.mlp["layers"](x)[:, 0]
