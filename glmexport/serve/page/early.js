// Runs before the first paint, so a chosen theme does not flash in the other one. A module would run too late.
try {
  const chosen = JSON.parse(localStorage.getItem("glmexport.settings") ?? "{}").theme;
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // no storage, or not ours: the system's theme
}
