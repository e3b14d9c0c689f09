"""Programs beside training: speed, conversion, ablations, studies. Nothing imports them."""
