"use strict";
// Theme, layers and their opacity. Without this script the page still shows everything but the live view.
(() => {
  const root = document.documentElement;
  const theme = document.getElementById("theme");
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function showTheme() {
    const dark = chosen === null ? prefersDark.matches : chosen;
    root.dataset.theme = dark ? "dark" : "light";
    theme.setAttribute("aria-pressed", String(dark));
  }
  theme.addEventListener("click", () => {
    chosen = root.dataset.theme !== "dark";
    showTheme();
  });
  prefersDark.addEventListener("change", showTheme);
  showTheme();

  const opacity = document.getElementById("layer-opacity");
  if (!opacity) return;
  const gallery = document.getElementById("layer-gallery");
  const layered = [...document.querySelectorAll(".layer, .layer-about")];
  function showOpacity() {
    gallery.style.setProperty("--opacity", String(opacity.value / 100));
  }
  function showLayer(key) {
    for (const one of layered) one.classList.toggle("on", one.dataset.layer === key);
  }
  opacity.addEventListener("input", showOpacity);
  for (const choice of document.querySelectorAll('input[name="layer"]'))
    choice.addEventListener("change", () => showLayer(choice.value));
  const checked = document.querySelector('input[name="layer"]:checked');
  if (checked) showLayer(checked.value); // a browser that goes back keeps what was chosen
  showOpacity();
})();
