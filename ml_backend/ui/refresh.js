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
  if (shown.nodeType !== Node.ELEMENT_NODE || shown.matches("form, a")) {
    shown.replaceWith(fresh);
    return;
  }
  for (const name of shown.getAttributeNames()) if (!fresh.hasAttribute(name)) shown.removeAttribute(name);
  for (const name of fresh.getAttributeNames()) shown.setAttribute(name, fresh.getAttribute(name));
  const parts = [...shown.childNodes];
  const wanted = [...fresh.childNodes];
  let end = null; // of what differs
  const areEqual = (index) => parts.length && wanted.length && parts.at(index).isEqualNode(wanted.at(index));
  for (; areEqual(0); parts.shift()) wanted.shift();
  for (; areEqual(-1); end = parts.pop()) wanted.pop();
  for (const [old, part] of pairs(parts, wanted)) {
    for (; parts[0] !== old; parts.shift()) parts[0].remove();
    for (; wanted[0] !== part; wanted.shift()) shown.insertBefore(wanted[0], old);
    renew(parts.shift(), wanted.shift());
  }
  parts.forEach((part) => part.remove());
  wanted.forEach((part) => shown.insertBefore(part, end));
}

// Which of the shown nodes becomes which fresh one, in the order of both, so that the most text stays as it is (the
// heaviest common subsequence): a paragraph or a row that is new must not shift into the place of those that follow it.
function pairs(shown, fresh) {
  const worth = shown.map((one) => fresh.map((other) => worthOfPair(one, other)));
  const best = Array.from({ length: shown.length + 1 }, () => new Array(fresh.length + 1).fill(0));
  for (let i = shown.length - 1; i >= 0; i--)
    for (let j = fresh.length - 1; j >= 0; j--)
      best[i][j] = Math.max(best[i + 1][j], best[i][j + 1], worth[i][j] + best[i + 1][j + 1]);
  const found = [];
  for (let i = 0, j = 0; i < shown.length && j < fresh.length; )
    if (worth[i][j] && best[i][j] === worth[i][j] + best[i + 1][j + 1]) found.push([shown[i++], fresh[j++]]);
    else if (best[i][j] === best[i + 1][j]) i++;
    else j++;
  return found;
}

function worthOfPair(shown, fresh) {
  if (shown.nodeName !== fresh.nodeName || shown.getAttribute?.("class") !== fresh.getAttribute?.("class")) return 0;
  if (shown.isEqualNode(fresh)) return 3 + shown.textContent.trim().length;
  // A row that has changed begins with the same number of its cycle.
  return shown.firstElementChild?.isEqualNode(fresh.firstElementChild) ? 2 : 1;
}

setTimeout(refresh, PAUSE_MS);
