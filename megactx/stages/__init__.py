"""One LightningModule per stage; a stage is a recipe."""
