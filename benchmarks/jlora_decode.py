"""Beam search and sampling in jlora, as `jlora generate` does them."""

from __future__ import annotations

from benchmarks.prompts import Prompts


def make(spec: dict):
    """One round decodes more prompts than fit in a batch (the next one replaces one that ends), or
    with ``streams`` lets so many texts of equal length be written together."""
    from jlora import PeftModel, engine, load
    from jlora.decoding.beam import BeamConfig, beam_search
    from jlora.decoding.sampling import GenerateConfig, generate
    from jlora.layers import set_trainable
    from jlora.models.hub import build_model
    from jlora.system.runtime import use_gpu

    use_gpu(spec.get("device") == "cuda")
    model = load(spec["model"]) if spec["model"] else build_model(spec["config"])
    set_trainable(model, ())
    if spec["adapter"]:
        model = PeftModel.from_pretrained(model, spec["adapter"])
    engine.prepare(model, spec["precision"], keep_weights=False)
    model.eval()
    prompts = Prompts(spec)
    config = BeamConfig(
        eos_token_ids=tuple(spec["ends"]), num_beams=spec["beams"],
        no_repeat_ngram_size=spec["no_repeat_ngram"], length_penalty=0.8,
        max_new_tokens=spec["new_tokens"], batch_size=spec["batch_size"],
        rank_up_to=spec["rank_up_to"],
    )  # fmt: skip

    def work(streams: int = 0, tokens: int = 0, temperature: float = 0.0):
        if not streams:
            batch = prompts.next(spec["inputs"])
            found = beam_search(model, list(batch.values()), config)
            return prompts.said(batch, [best[0].ids for best in found])
        batch = prompts.first(streams)
        free = GenerateConfig(
            (), max_new_tokens=tokens, temperature=temperature, batch_size=streams
        )
        found = generate(model, list(batch.values()), free)
        return prompts.said(batch, [each.ids for each in found], tokens)

    return work
