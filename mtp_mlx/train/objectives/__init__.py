"""What a loss is: one file per objective, all with the call `objective(attached, batch) -> LossParts`."""
