"""The models: one readable file a family, in plain Jittor; they define what is right."""
