// What other tabs of this browser have to know: which conversation has changed, and who writes an answer.

export class OtherTabs {
  /**
   * `changed(id, isCutOff)` is called for a conversation that another tab has saved or removed; `isCutOff`: that tab
   * goes, whatever answer it was writing. `underWay()` gives the conversations that this one is writing answers to.
   */
  constructor(changed, underWay) {
    this.channel = new BroadcastChannel("flashmoe");
    const tellAll = (isCutOff) => underWay().forEach((conversation) => this.tell(conversation, isCutOff));
    this.channel.addEventListener("message", ({ data }) => (data.asks ? tellAll(false) : changed(data.id, data.isCutOff)));
    addEventListener("pagehide", () => tellAll(true));
    this.channel.postMessage({ asks: true });
  }

  tell(conversation, isCutOff = false) {
    this.channel.postMessage({ id: conversation.id, isCutOff });
  }
}
