"""Which saved step becomes the finished file: what is measured of each, and the rule that weighs it."""
