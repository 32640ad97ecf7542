"""The TGI face of PreFT: seams for Text Generation Inference 3.3.7. Nothing is patched by importing it."""
