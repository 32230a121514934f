"""Recipes, and what is done with them: a run, a sweep, answers to prompts, the memory they take."""
