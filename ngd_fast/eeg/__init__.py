"""EEG recordings, or tables of band power, to topomaps with ratings."""
