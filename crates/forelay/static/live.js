// Keeps the page up to date: when something happened, and every few seconds while it is seen.
"use strict";
(() => {
  const EVERY_MS = 5000;
  const page = () => document.getElementById("page");
  const live = document.getElementById("live");
  const lost = document.getElementById("lost");
  let due = false;
  let last = 0;

  const tell = (words) => {
    if (lost.textContent !== words) lost.textContent = words;
    live.classList.toggle("lost", words !== "");
  };
  // What can be scrolled or focused keeps its place: the new page has it at the same one.
  const places = () => [...page().querySelectorAll("a, .scroll, .console")];

  const refresh = () => {
    due = false;
    last = Date.now();
    if (document.hidden || !page()) return;
    if (String(getSelection())) {
      tell("Stands still while text is selected");
      return;
    }
    const before = places();
    const scrolled = before.map((one) => [one.scrollLeft, one.scrollTop]);
    const focused = before.indexOf(document.activeElement);
    htmx
      .ajax("GET", location.pathname, { target: "#page", select: "#page", selectOOB: "#host", swap: "outerHTML" })
      .then(() => {
        const after = places();
        after.forEach((one, at) => {
          if (scrolled[at]) [one.scrollLeft, one.scrollTop] = scrolled[at];
        });
        if (focused >= 0 && after[focused]) after[focused].focus({ preventScroll: true });
      });
  };
  const soon = () => {
    if (due) return;
    due = true;
    setTimeout(refresh, Math.max(300, 1000 - (Date.now() - last)));
  };
  setInterval(() => {
    if (Date.now() - last >= EVERY_MS) soon();
  }, 1000);
  document.addEventListener("visibilitychange", soon);

  // Whether pages come says whether there is a connection; events only say when to look.
  document.addEventListener("htmx:sendError", () => tell("No connection to the daemon; trying again"));
  document.addEventListener("htmx:responseError", (event) => {
    const words = {
      401: "This session is over: open what `forelay dashboard` prints",
      404: "This is not there any more",
    };
    tell(words[event.detail.xhr.status] || "The daemon could not answer; trying again");
  });
  document.addEventListener("htmx:afterOnLoad", (event) => {
    if (event.detail.successful) tell("");
  });

  const kinds = document.body.dataset.kinds.trim().split(" ");
  const listen = () => {
    const events = new EventSource("/v1/events");
    for (const kind of kinds) events.addEventListener(kind, soon);
    events.onerror = () => {
      soon();
      // Refused, not cut short: a browser does not try that again by itself.
      if (events.readyState === EventSource.CLOSED) setTimeout(listen, EVERY_MS);
    };
  };
  listen();
})();
