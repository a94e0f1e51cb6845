"use strict";
// Before the page is drawn: light or dark as it was last chosen here, else as the system has it.
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("hinge-theme");
  } catch {
    // storage may be forbidden
  }
  const dark = chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}
