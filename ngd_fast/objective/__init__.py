"""The training objective of NeuroGaze-Distill, alone: imports nothing else of the package."""
