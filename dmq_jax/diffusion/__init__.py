"""The diffusion process: noise schedules, timesteps and samplers; knows no network."""
