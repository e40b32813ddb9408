"""How the bundled model is made, stage by stage: autoencoder, text encoder, denoiser, preference tuning, files."""
