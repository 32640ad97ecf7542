"""The proxy on the public port: it checks adapter ids before TGI sees a request, and keeps the shards in step.

Imports `tgi_patch.server.control` (the protocol between the two), `tgi_patch.settings` and `preft_core`.
"""
