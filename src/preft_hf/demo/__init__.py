"""`preft demo`: a real small model, a real small task, and a look at what decoding runs."""
