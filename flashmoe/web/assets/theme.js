// Runs before the first paint, or a page kept dark would flash white.
try {
  const theme = localStorage.getItem("flashmoe.theme");
  if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
} catch {
  // a browser that keeps nothing: the system's colours
}
