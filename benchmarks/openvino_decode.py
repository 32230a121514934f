"""Beam search and sampling by OpenVINO GenAI, from the folder that optimum-intel exported."""

from __future__ import annotations

from benchmarks.prompts import Prompts


def make(spec: dict):
    """One round decodes the next prompts, or with ``streams`` so many texts of equal length."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2  # GB of keys and values
    pipeline = genai.ContinuousBatchingPipeline(
        spec["model"], scheduler, "CPU", {**spec["properties"]}
    )
    prompts = Prompts(spec)

    def generate(batch, config) -> list[list[int]]:
        ids = [ov.Tensor(np.array([prompt], np.int64)) for prompt in batch.values()]
        found = pipeline.generate(ids, [config] * len(ids))
        return [each.m_generation_ids[0] for each in found]

    def work(streams: int = 0, tokens: int = 0, temperature: float = 0.0):
        config = genai.GenerationConfig()
        if streams:
            batch = prompts.first(streams)
            config.max_new_tokens, config.ignore_eos = tokens, True
            if temperature:
                config.do_sample, config.temperature = True, temperature
        else:
            batch = prompts.next(spec["inputs"])
            config.num_beams, config.max_new_tokens = spec["beams"], spec["new_tokens"]
            config.length_penalty = 0.8
            config.no_repeat_ngram_size = spec["no_repeat_ngram"] or 2**31
            config.stop_criteria = genai.StopCriteria.HEURISTIC
            config.eos_token_id, config.stop_token_ids = spec["ends"][0], set(spec["ends"])
        return prompts.said(batch, generate(batch, config), tokens)

    return work
