// Keeps the dashboard up to date without loading it anew: what did not change stays as it is, and so do the place where
// one reads, the focus and what is marked.
"use strict";

const PAUSE_MS = 3000;
const PATIENCE_MS = 30000;
const outdated = document.createElement("p");
outdated.className = "problem";
let seenAt = new Date();

async function refresh() {
  try {
    // Without user name and password, which the page's address may hold; the browser knows them by now.
    const address = location.origin + location.pathname;
    const answer = await fetch(address, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    // Another release, or the page of a proxy that wants a password.
    if (styleOf(page) !== styleOf(document)) return location.reload();
    document.title = page.title;
    outdated.remove();
    renew(document.body, page.body);
    seenAt = new Date();
  } catch (error) {
    document.title = "not up to date - TSP active learning";
    outdated.textContent = `This page cannot be brought up to date (${error.message}). What stands here is of ${seenAt.toLocaleTimeString()}.`;
    document.body.prepend(outdated);
  }
  setTimeout(refresh, PAUSE_MS);
}

function styleOf(page) {
  return page.querySelector("style")?.textContent;
}

function renew(shown, fresh) {
  if (shown.isEqualNode(fresh)) return;
  // Forms and links are replaced as a whole: who is pressing one at this moment must not press another one.
  if (shown.nodeName !== fresh.nodeName || shown.nodeType !== Node.ELEMENT_NODE || shown.matches("form, a")) {
    shown.replaceWith(fresh);
    return;
  }
  for (const name of shown.getAttributeNames()) if (!fresh.hasAttribute(name)) shown.removeAttribute(name);
  for (const name of fresh.getAttributeNames()) shown.setAttribute(name, fresh.getAttribute(name));
  const parts = [...shown.childNodes];
  const wanted = [...fresh.childNodes];
  wanted.forEach((part, index) => (index < parts.length ? renew(parts[index], part) : shown.append(part)));
  parts.slice(wanted.length).forEach((part) => part.remove());
}

setTimeout(refresh, PAUSE_MS);
