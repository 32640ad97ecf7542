"""What runs in the shard processes of TGI's Python server: adapters of a model, routing, prefix cache, control.

Imports `tgi_patch.settings` and `preft_core`, never `tgi_patch.gateway`. `tgi_patch.patches` stands above it.
"""
