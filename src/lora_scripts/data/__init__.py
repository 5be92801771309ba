"""Pictures, captions, buckets, cached encodings."""
