"""Files that can be trusted: written whole or not at all, with checksums."""
