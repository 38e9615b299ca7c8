"""How a model runs: its dense layers, the chain of its layers, batch norm; knows no observation."""
