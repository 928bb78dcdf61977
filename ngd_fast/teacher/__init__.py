"""The network that regresses valence and arousal from topomaps: training, splits, cross-validation."""
