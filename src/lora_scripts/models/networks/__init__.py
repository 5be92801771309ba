"""The networks of Stable Diffusion 1, 2 and SDXL in plain torch: U-Net and autoencoder.

Their tensors have the names, and their passes the operations in the order, of diffusers' UNet2DConditionModel and AutoencoderKL,
so that weights, LoRA files and numbers are the same. That library is not needed to train: importing it, with all that is installed
beside it, takes twice as long as importing torch. What a configuration asks of it beyond these models is left to it.
"""
