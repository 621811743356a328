"""One prefill with pruning: encoder, decoder, the cache behind them, and the record of what was decided."""
