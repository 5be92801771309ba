"""The networks of Stable Diffusion 1, 2 and SDXL in plain torch: U-Net, autoencoder, text encoders.

Their tensors have the names, and their passes the operations in the order, of diffusers' UNet2DConditionModel and AutoencoderKL
and of transformers' CLIPTextModel, so that weights, LoRA files and numbers are the same. Those libraries are not needed to train:
importing them, with all that is installed beside them, takes three times as long as importing torch. What a configuration asks
for beyond these models is left to them.
"""
