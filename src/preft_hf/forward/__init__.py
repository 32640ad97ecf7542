"""Decides which tokens of each forward are prefill, and which adapter each row has. Imports `layers` and below.

One forward, from the call to the layers:

    model(...)  ->  hooks.Attachment._before_forward
                      routing    adapter_names -> RowAdapters, one adapter per row; pins those of a pool
                      decision   prefill_mask, else labels, else preft_phase, else the cache -> phase
                      calls      remembers the call, so that an interrupted one is cleaned up
                ->  layers.phase.ForwardPhase, which every adapter layer reads
                ->  hooks.Attachment._after_forward: ends the phase, unpins, records the cache's owner

`generate` gives every forward its prefill_mask:

    generate  ->  generation.PromptBoundary  ->  positions.Generation   counts the request's tokens
                                             ->  cache_record           what a continued cache holds, and of whom

Who owns whom. One of each per model, made by the first adapter or pool and removed with the last:

    model ._preft_attachment = Attachment      the hooks and the adapter layers
                                 |- phase      ForwardPhase    the phase of the running forward, per thread
                                 |- calls      Calls           running forwards and what they have pinned
                                 |- routing    Routing         adapters by name: of the layers, and of `routing.pool`
                                 |- boundary   PromptBoundary  the replaced methods (`generation.PATCHES`)
                                                 |- Generation  one per running generate, per thread

    layer.phase is attachment.phase, for every adapter layer. cache._preft_record is a CacheRecord.
"""
