"""Configs of reward models in miniature."""

OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {
        "layers": 2,
        "width": 24,
        "head_width": 8,
        "patch_size": 4,
        "image_size": 16,
        "mlp_ratio": 3.5,
    },
    "text_cfg": {"layers": 2, "width": 16, "heads": 2, "context_length": 9, "vocab_size": 40},
}
CN_CLIP = {
    "embed_dim": 12,
    "vision_layers": 2,
    "vision_width": 24,
    "vision_head_width": 8,
    "vision_patch_size": 4,
    "image_resolution": 16,
    "vocab_size": 40,
    "text_hidden_size": 16,
    "text_num_hidden_layers": 2,
    "text_num_attention_heads": 2,
    "text_intermediate_size": 20,
    "text_max_position_embeddings": 60,
}
IMAGE_REWARD = {
    "vision_config": {"image_size": 16, "patch_size": 4, "width": 24, "layers": 2, "heads": 3},
    "text_config": {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 60,
    },
}
