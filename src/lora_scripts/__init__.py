"""Pictures in, a LoRA file that works in your own tools out; everything on your own machine."""

__version__ = "0.1.0"
