"""Which method, at what cost, how sure: cells, the statistics over them, and the report made from them."""
