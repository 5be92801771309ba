"""Is this data set worth a night of training, and will the run fit? Answered before the run, one file per group of checks."""
