"""Students: networks, their training, their use.

A training from the outside in, each calling the next: ``suite`` (which runs) -> ``run`` (a configuration to a finished
folder) -> ``trainer`` (epochs over a feed) -> ``step_runner`` (line by line, or one CUDA graph) -> ``step`` (forward,
objective, backward, AdamW). A ``session`` is what one student keeps beside that loop: progress, best epoch, folder.
"""
