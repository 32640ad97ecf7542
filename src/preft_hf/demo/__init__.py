"""`preft demo`: a small real model, a small real task, and a count of the operations that decoding runs."""
