"""One YAML for each variant; installed with the package so that `--config B3` works anywhere."""
