"""The frozen bank of valence/arousal prototypes (the paper's Algorithm 1): building, file, analysis."""
