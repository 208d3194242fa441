// Keeps the page up to date: when something happened, and every few seconds while it is seen.
"use strict";
(() => {
  const page = () => document.getElementById("page");
  const live = document.getElementById("live");
  const lost = document.getElementById("lost");
  let due = false;
  let last = 0;

  const refresh = () => {
    due = false;
    last = Date.now();
    if (document.hidden || !page()) return;
    // What somebody reads or selects is left alone.
    const at = document.activeElement;
    if (String(getSelection()) || (at && at.id !== "page" && page().contains(at))) return;
    const scrolled = [...page().querySelectorAll(".scroll, .console")].map((one) => [one.scrollLeft, one.scrollTop]);
    htmx
      .ajax("GET", location.pathname, { target: "#page", select: "#page", selectOOB: "#host", swap: "outerHTML" })
      .then(() => {
        page().querySelectorAll(".scroll, .console").forEach((one, at) => {
          if (scrolled[at]) [one.scrollLeft, one.scrollTop] = scrolled[at];
        });
      });
  };
  const soon = () => {
    if (due) return;
    due = true;
    setTimeout(refresh, Math.max(300, 1000 - (Date.now() - last)));
  };
  setInterval(() => {
    if (Date.now() - last >= 5000) soon();
  }, 1000);

  const events = new EventSource("/v1/events");
  events.onopen = () => {
    lost.textContent = "";
    live.classList.remove("lost");
  };
  events.onerror = () => {
    lost.textContent = "No connection to the daemon; trying again";
    live.classList.add("lost");
  };
  for (const kind of ["launching", "started", "mounted", "ready", "unreachable", "stopped", "failed", "evicting", "waiting", "wait-over", "snapshot-made", "snapshot-failed", "degraded", "restored", "pressure"]) {
    events.addEventListener(kind, soon);
  }
})();
