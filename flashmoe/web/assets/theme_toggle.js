// Dark or light: the system's choice until the button is pressed.

import { byId } from "./dom.js";

/** `changed` is called when colours are others. */
export function bindTheme(changed) {
  const button = byId("toggle-theme");
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    changed();
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("flashmoe.theme", root.dataset.theme);
    } catch {
      // kept as long as the page
    }
    show();
  });
  dark.addEventListener("change", show);
  show();
}
