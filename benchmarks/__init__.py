"""Side-by-side runs against other libraries; results/ holds the JSON behind every published figure."""
