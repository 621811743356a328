"""LLaVA-1.5's two stages on any host with a projector, with any method attached, by transformers' `Trainer`."""
