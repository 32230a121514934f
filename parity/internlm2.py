"""InternLM2 for the reference: transformers' Llama, the fused weights split among its layers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig


class Layer(nn.Module):
    """A block's linear layers, by InternLM2's names; PEFT puts its adapter on them."""

    def __init__(self, source, config: dict):
        super().__init__()
        C, inner = config["hidden_size"], config["intermediate_size"]
        kv_heads, D = config["num_key_value_heads"], source.self_attn.head_dim
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        width = (config["num_attention_heads"] + 2 * kv_heads) * D
        self.attention.wqkv = nn.Linear(C, width, bias=config["bias"])
        self.attention.wo = nn.Linear(C, C, bias=config["bias"])
        self.feed_forward.w1 = nn.Linear(C, inner, bias=False)
        self.feed_forward.w3 = nn.Linear(C, inner, bias=False)
        self.feed_forward.w2 = nn.Linear(inner, C, bias=False)


class Part(nn.Module):
    """In the place of q_proj, k_proj or v_proj: some heads of each group of the fused layer."""

    def __init__(self, fused, heads: slice, groups: int, D: int):
        super().__init__()
        self.fused, self.heads, self.groups, self.D = [fused], heads, groups, D

    def forward(self, x):
        attention, name = self.fused[0]
        grouped = getattr(attention, name)(x).unflatten(-1, (self.groups, -1, self.D))
        return grouped[..., self.heads, :].flatten(-3)


class Call(nn.Module):
    """In the place of a layer: another one, found anew at every call, for PEFT replaces it."""

    def __init__(self, owner, name):
        super().__init__()
        self.at = [(owner, name)]

    def forward(self, x):
        owner, name = self.at[0]
        return getattr(owner, name)(x)


class InternLM2(nn.Module):
    def __init__(self, config: dict, seed: int):
        super().__init__()
        self.settings = config
        own = {k: v for k, v in config.items() if k not in ("model_type", "bias", "rope_scaling")}
        llama = AutoModelForCausalLM.from_config(
            LlamaConfig(**own), attn_implementation="eager", dtype=torch.float32
        ).eval()
        groups, D = config["num_key_value_heads"], llama.model.layers[0].self_attn.head_dim
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for source in llama.model.layers:
            layer = Layer(source, config)
            self.model.layers.append(layer)
            fused, mlp = (layer.attention, "wqkv"), layer.feed_forward
            for name, heads in (("q", slice(0, -2)), ("k", slice(-2, -1)), ("v", slice(-1, None))):
                setattr(source.self_attn, f"{name}_proj", Part(fused, heads, groups, D))
            source.self_attn.o_proj = Call(layer.attention, "wo")
            for name, own_name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                setattr(source.mlp, f"{name}_proj", Call(mlp, own_name))
        self.llama = [llama]  # no submodule: its names are not InternLM2's
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(self.tensors().items()):
                values = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() == 2:
                    scale = 0.5 if "tok_emb" in name else 1.2 / parameter.shape[-1] ** 0.5
                    parameter.copy_(scale * values)
                else:
                    parameter.copy_(1 + 0.3 * values if "norm" in name else 0.2 * values)

    def tensors(self) -> dict:
        """All parameters by InternLM2's names."""
        llama = self.llama[0]
        found = {
            "model.tok_embeddings.weight": llama.model.embed_tokens.weight,
            "model.norm.weight": llama.model.norm.weight,
            "output.weight": llama.lm_head.weight,
        }
        for i, (layer, source) in enumerate(zip(self.model.layers, llama.model.layers)):
            start = f"model.layers.{i}"
            found.update({f"{start}.{n}": p for n, p in layer.named_parameters()})
            found[f"{start}.attention_norm.weight"] = source.input_layernorm.weight
            found[f"{start}.ffn_norm.weight"] = source.post_attention_layernorm.weight
        return found

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        tensors = {n: p.detach().clone().contiguous() for n, p in self.tensors().items()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.settings))

    def forward(self, input_ids=None, **others):
        return self.llama[0](input_ids, **others)
