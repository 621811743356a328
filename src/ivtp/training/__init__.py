"""LLaVA-1.5's two stages of training, on any host with a projector and with any method attached, by transformers' Trainer."""
